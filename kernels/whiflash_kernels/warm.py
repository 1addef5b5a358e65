"""Compiling what a round launches between models before anybody waits for it."""

from itertools import product

import torch
from torch import Tensor

from whiflash_kernels.block import accept_and_commit, prepare_mixed_block
from whiflash_kernels.dispatch import backend_for
from whiflash_kernels.drafts import choose_drafts, lay_drafts
from whiflash_kernels.structs import Drafts, HostDrafts


def warm_up(
    text: Tensor,
    req_to_token: Tensor,
    stops: Tensor,
    requests: int,
    widths: set[int],
    voices: tuple[int, int],
    vocabulary: int,
) -> None:
    """Place, choose, pack and accept drafts of batches of every size that kernels are compiled for.

    Args:
        text: [request rows, positions] int64; row 0 is nobody's, and is written to. req_to_token: [request rows,
            positions] int32. stops: [request rows, S] int64. requests: of the largest batch. widths: drafts that arms
            make at most. voices: of each request, and tokens of each at most, as of `HostDrafts`. vocabulary: ids that
            the target has.

    Waits for nothing; does nothing on a CPU, where nothing is compiled.
    """
    if text.device.type == "cpu" or backend_for(text) != "triton":
        return
    from whiflash_kernels.triton_kernels.launch import FEWEST_LANES

    device, size = text.device, 1
    while True:
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        count, columns = voices
        silent = torch.zeros(size, count, dtype=torch.int64, device=device)
        unlikely = torch.zeros(size, count, columns, dtype=torch.float32, device=device)
        # A server whose arms do not speak has none to choose among.
        said = (None, HostDrafts(unlikely.long(), unlikely, silent, silent)) if count else (None,)
        for width, (has_alive, has_sure) in product(sorted(widths), product((True, False), repeat=2)):
            chances = torch.zeros(size, width, dtype=torch.float32, device=device)
            tokens = torch.zeros(size, width, dtype=torch.int64, device=device)
            alive, sure = (chances if has else None for has in (has_alive, has_sure))
            own = Drafts(tokens, zeros, alive, sure)
            for put in (text, None):
                laid = lay_drafts(
                    [(zeros, own)] * 2,
                    zeros,
                    zeros,
                    width=width,
                    confidences=width,
                    vocabulary=vocabulary,
                    text=put,
                )
            copied = own._replace(alive=chances)
            for appended, heard, copies, room in product((None, own), said, (None, copied), (None, 0)):
                chosen = choose_drafts(
                    laid,
                    zeros,
                    zeros,
                    text,
                    appended=appended,
                    from_host=heard,
                    copies=copies,
                    rooms=zeros,
                    room=room,
                )
            block = prepare_mixed_block(
                zeros, chosen.tokens, chosen.widths, zeros, zeros, req_to_token, rows=size
            )
            ids = block.input_ids
            accept_and_commit(
                ids,
                ids,
                block.qo_indptr,
                zeros,
                stride=width + 1,
                request_slots=zeros,
                stops=stops,
                text=text,
            )
        if size >= requests:
            return
        size = min(2 * max(size, FEWEST_LANES // 2), requests)
