"""Compiles the kernels that rounds launch between models' forwards, before the first request."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from whiflash_kernels.backlog import claim_backlogs, park, unpark
from whiflash_kernels.block import accept_and_commit, prepare_mixed_block
from whiflash_kernels.copies import propose_copies
from whiflash_kernels.dispatch import backend_for
from whiflash_kernels.drafts import choose_drafts, cut_drafts, lay_drafts
from whiflash_kernels.passes import draft_inputs
from whiflash_kernels.sampling import sample_rows
from whiflash_kernels.structs import BacklogRings, Claims, Drafts, PassInputs, SamplingTable


@dataclass(frozen=True)
class Served:
    """The sizes and tables of a server, for which kernels are compiled.

    Args:
        text: [request rows, positions] int64; row 0, which no request has, is written to. req_to_token: [request rows,
            positions] int32. stops: [request rows, S] int64. rings: parked features. watermarks: [drafters, request
            rows] int64; row 0 may be claimed. sampling: by request row.
        requests: size of the largest batch. widths: largest number of drafts of each arm. candidates: number of the
            host's candidates per request, and most tokens of each. vocabulary: ids of the target. bins: of confidence.
        columns: for each drafter with KV, its chunks and their width, as `unpark` takes them, and whether it starts
            from a feature. copied: most tokens of a copy and buckets of its chances; None if the device copies nothing.
    """

    text: Tensor
    req_to_token: Tensor
    stops: Tensor
    rings: BacklogRings
    watermarks: Tensor
    sampling: SamplingTable
    requests: int
    widths: set[int]
    candidates: tuple[int, int]
    vocabulary: int
    bins: int
    columns: Sequence[tuple[Sequence[int] | None, int, bool]]
    copied: tuple[int, int] | None


def warm_up(served: Served) -> None:
    """Launch every kernel that rounds launch between models' forwards, once for each size that it is compiled for.

    It does not wait for the device. On a CPU it does nothing, since nothing is compiled there.
    """
    if served.text.device.type != "cpu" and backend_for(served.text) == "triton":
        launch_all(served)


def launch_all(served: Served) -> None:
    """Launch the kernels of `warm_up` on any device."""
    _of_one_request(served)
    _of_batches(served)


def _of_one_request(served: Served) -> None:
    """Launch the kernels that are compiled once for any number of requests: a program serves one or a few of them."""
    device, text = served.text.device, served.text
    zeros, ones = (make(1, dtype=torch.int64, device=device) for make in (torch.zeros, torch.ones))
    if len(served.watermarks):
        none = torch.zeros_like(served.watermarks[:, :1], memory_format=torch.contiguous_format)
        for claims in (None, Claims(zeros.clone(), none.clone(), none.clone())):
            claim_backlogs(served.watermarks, zeros, zeros, none, into=claims)
        # Only a prefill parks outside a graph.
        park(served.rings, served.rings.features[0, :1], zeros, zeros, zeros, zeros, zeros, max_length=1)
    calibration = torch.ones(served.bins + 2, dtype=torch.float32, device=device)
    for chunks, width, starts in served.columns:
        unpark(served.rings, zeros, zeros, zeros, served.req_to_token, rows=1, chunks=chunks, chunk_width=width)
        gather = partial(draft_inputs, chunks=chunks if starts else (), chunk_width=width)
        for members in (None, zeros):
            inputs = gather(served.rings, members, zeros, ones, zeros, zeros, calibration)
            place = PassInputs(*map(torch.clone, inputs))
            gather(served.rings, members, zeros, ones, zeros, zeros, calibration, into=place)
    edges = torch.ones(served.bins - 1, dtype=torch.float32, device=device)
    for width in served.widths:
        cut_drafts(calibration.new_ones(1, width), calibration, edges, zeros)
    if served.copied is None:
        return
    width, buckets = served.copied
    boundaries = torch.ones(buckets, dtype=torch.int32, device=device)
    chances = calibration.new_ones(1, buckets, 4)
    back = torch.zeros_like(text[:, 0], memory_format=torch.contiguous_format)
    for behind in (None, (zeros, chances[:, 0])):
        propose_copies(
            text, zeros, zeros, back, zeros, calibration[:1], chances, boundaries, width=width, worth=0.5, behind=behind
        )


def _of_batches(served: Served) -> None:
    """Launch the kernels whose programs look at all requests, for each size of batch that they are compiled for."""
    from whiflash_kernels.triton_kernels.launch import FEWEST_LANES

    text, stops, requests = served.text, served.stops, served.requests
    device, size = text.device, 1
    while True:
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        members = torch.arange(size, device=device)  # a part may not name a request twice
        count, columns = served.candidates
        nothing = torch.zeros(size, count, dtype=torch.int64, device=device)
        unlikely = torch.zeros(size, count, columns, dtype=torch.float32, device=device)
        # Without arms that propose there are no candidates to choose among.
        candidates = (None, Drafts(unlikely.long(), nothing, unlikely)) if count else (None,)
        for width in sorted(served.widths):
            chances = torch.zeros(size, width, dtype=torch.float32, device=device)
            tokens = torch.zeros(size, width, dtype=torch.int64, device=device)
            every = [Drafts(tokens, zeros, alive, sure) for alive, sure in product((chances, None), repeat=2)]
            for drafts, put in product(every, (text, None)):
                laid = lay_drafts(
                    [(members, drafts)] * 2,
                    zeros,
                    zeros,
                    width=width,
                    confidences=width,
                    vocabulary=served.vocabulary,
                    text=put,
                )
            for appended, from_host, copies, most in product(
                (None, every[0], every[-1]), candidates, (None, every[0]), (None, 0)
            ):
                chosen = choose_drafts(
                    laid,
                    zeros,
                    zeros,
                    text,
                    appended=appended,
                    from_host=from_host,
                    at=nothing,
                    copies=copies,
                    limits=zeros,
                    most_drafts=most,
                    stops=stops,
                    drawn=zeros,
                )
            block = prepare_mixed_block(
                zeros, chosen.tokens, chosen.widths, zeros, zeros, served.req_to_token, rows=size
            )
            ids = block.input_ids
            accept_and_commit(
                ids, ids, block.qo_indptr, zeros, stride=width + 1, request_slots=zeros, stops=stops, text=text
            )
        _sample(served, zeros)
        if size >= requests:
            return
        size = min(2 * max(size, FEWEST_LANES // 2), requests)


def _sample(served: Served, zeros: Tensor) -> None:
    """Sample for batches that are not committed in their graph: with masks and without."""
    logits = torch.zeros(1, served.vocabulary, dtype=torch.float32, device=zeros.device)
    indptr = torch.zeros(len(zeros) + 1, dtype=torch.int32, device=zeros.device)
    bits = torch.zeros(1, -(-served.vocabulary // 32), dtype=torch.int32, device=zeros.device)
    for masks in (None, (bits, zeros)):
        sample_rows(logits, indptr, zeros, zeros, served.sampling, masks=masks)
