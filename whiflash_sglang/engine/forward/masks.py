"""Make bit masks, for SGLang's sampler, of the tokens that grammars allow at every verified row."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.utils.common import async_d2h
from whiflash_kernels import MixedBlock

from whiflash_sglang.device.transfers import mask_places, masks_of_places
from whiflash_sglang.records.core import Verified
from whiflash_sglang.structure.spending import Spending


def constrained(batch: Any, lengths: Sequence[int], stride: int) -> dict[int, Any]:
    """Return the grammars that may constrain a row of this round, by the indices of their requests.

    Args:
        lengths: most tokens with KV of each request before the round. stride: most rows of a request.
    """
    found = {i: req.grammar for i, req in enumerate(batch.reqs) if req.grammar is not None}
    return {i: each for i, each in found.items() if lengths[i] + stride >= getattr(each, "free_until", 0)}


class Masks:
    """The masks of a round's packed rows: each request's rows are a chain after its bonus token.

    Made before the target's forward, so that the host waits for a copy of the rows' tokens while the forward runs.

    Args:
        block: the rows. grammars: by the requests' indices, one at least.

    Attributes: (filled by `build`)
        packed: [M, words] int32 on the host, pinned if the rows are on a GPU; `mask_places` are at its beginning, -1
            for rows of drafts that there was no time to mask, which must not be accepted.
    """

    def __init__(self, block: MixedBlock, grammars: Mapping[int, Any]) -> None:
        rows, self._grammars = block.ids_and_requests, grammars
        self._size, self._device = rows.shape[1], rows.device
        self._host = async_d2h(rows)
        self._copied = torch.get_device_module(self._device).Event()
        self._copied.record()

    def build(self, batch: Any, spending: Spending) -> None:
        """Make the masks; the time is charged to each request.

        A first row gets its mask however long that takes. Drafts that there is no time for are rejected. A request
        whose grammar allows no token is aborted.
        """
        batch.sampling_info.grammar_mask = None  # it is the prefill's
        grammars = self._grammars
        self._copied.synchronize()
        ids, owners = self._host.tolist()
        widths = Counter(owners)
        vocabulary = batch.sampling_info.vocab_size
        words = -(-vocabulary // 32)
        # Rows that nothing constrains share the first mask after the places.
        free = masks_of_places(self._size, words)
        count = free + 1 + sum(widths[i] for i in grammars)
        # Grammars' own masks are not used, since some are in memory whose copy the host would wait for.
        bits = torch.full((count, words), -1, dtype=torch.int32, pin_memory=self._host.is_pinned())
        place, first, used = [free] * self._size, 0, free + 1
        for i in range(len(batch.reqs)):
            width = widths[i]
            if i in grammars:
                chain, own = ids[first + 1 : first + width], bits[used : used + width]
                fill = partial(fill_masks, grammars[i], chain, own, vocabulary, spending)
                try:
                    masked = spending.on(batch.reqs[i].rid, fill)
                except ValueError as error:  # as SGLang ends a request whose grammar refuses a token
                    masked = 1
                    batch.reqs[i].to_finish = FINISH_ABORT(f"Grammar failed: {error}", 500, "InternalServerError")
                place[first : first + width] = range(used, used + width)
                if masked < width:
                    place[first + masked] = -1
                used += width
            first += width
        mask_places(bits, self._size).numpy()[:] = place
        self.packed = bits

    def sent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Send the masks [M, words] int32 to the rows' device, and the index of each packed row's mask, [T] int64."""
        bits = self.packed.to(self._device, non_blocking=True)
        return bits, mask_places(bits, self._size)

    def apply(self, rows: Verified) -> Verified:
        """Mask the rows' logits in place, as SGLang does. Return them without masks."""
        assert rows.masks is not None
        bits, places = rows.masks
        GrammarMask(self._grammars[max(self._grammars)], bits[places]).apply(rows.logits)
        return rows._replace(masks=None)


def fill_masks(grammar: Any, drafts: Sequence[int], bits: torch.Tensor, vocabulary: int, spending: Spending) -> int:
    """Write the masks of one request's rows, as far as they are needed, and set its grammar back.

    After a draft that the grammar forbids, and after its end, nothing is accepted, so no mask is needed there.

    bits: [1 + drafts, words]. Raises ValueError if the grammar allows no token; it cannot be used any more then.

    Returns the number of rows whose drafts may be accepted: all, or those for which there was time.
    """
    taken = 0
    try:
        for row in range(len(bits)):
            if row:
                token = drafts[row - 1]
                if token >= vocabulary or not int(bits[row - 1, token // 32]) >> (token % 32) & 1:
                    break
                if spending.exhausted():
                    return row
                try:
                    grammar.accept_token(token)
                except ValueError:  # A processor forces it: it ends the request if it is committed, not as a draft.
                    return row
                taken += 1
            if grammar.is_terminated():
                break
            grammar.fill_vocab_mask(bits, row)
        return len(bits)
    finally:
        if taken:
            grammar.rollback(taken)
