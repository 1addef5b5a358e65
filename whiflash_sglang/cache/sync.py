"""Keeping every drafter's KV synchronised, lazily. Imports no SGLang.

Ties the watermarks (what is due), the rings (what was parked) and the drafters (who ingests) together.
"""

import time
from collections.abc import Mapping, Sequence

import torch

from whiflash_sglang.cache.backlog import FeatureRings, FeatureRows, Span, Watermarks
from whiflash_sglang.drafters.base import Drafter


class DraftSync:
    """Watermarks and rings of all requests.

    Args:
        drafters: by arm; those that keep KV are synchronised.
        capacity: tokens of a ring. width: columns of one captured row. dtype: of the captured features.
    """

    def __init__(
        self, drafters: Mapping[str, Drafter], capacity: int, width: int, dtype: torch.dtype
    ) -> None:
        self._drafters = drafters
        self._capacity, self._width, self._dtype = capacity, width, dtype
        self.watermarks = Watermarks([d.arm for d in drafters.values() if d.keeps_kv], capacity)
        self.seconds: dict[str, float] = {}
        """Host seconds of this round's catch-up, per arm."""
        self._routed: dict[int, int] = {}
        """Length at the last catch-up, per row: what lies beyond it is the last round's."""

    def bytes_for(self, rows: int) -> int:
        """What `allocate` will take."""
        return FeatureRings.bytes_for(rows, self._capacity, self._width, self._dtype)

    def allocate(self, slot_table: torch.Tensor) -> None:
        """Allocate one ring per row of `slot_table` [rows, ctx] int32 (request row and position → KV slot)."""
        self._slot_table = slot_table
        rows = int(slot_table.shape[0])
        self.rings = FeatureRings(rows, self._capacity, self._width, self._dtype, slot_table.device)

    def prefill(
        self, prompt: FeatureRows, row_ids: Sequence[int], rows: torch.Tensor, last_rows: torch.Tensor
    ) -> None:
        """Write both drafters' KV of an extend batch now: the radix tree takes the slots next.

        Args:
            prompt: the batch's packed rows. rows: [B] request rows. last_rows: [B], the last packed row of each.
        """
        for drafter in self._drafters.values():
            drafter.catch_up(prompt)
        tails = prompt.positions[last_rows]
        one = torch.ones_like(tails)
        self.rings.park(prompt.features, prompt.next_tokens, rows, tails, one, last_rows, widest=1)
        for row, tail in zip(row_ids, tails.tolist(), strict=True):
            self.watermarks.reset(row, tail + 1)
            self._routed[row] = tail + 1

    def catch_up(
        self, row_ids: Sequence[int], lengths: Sequence[int], routes: Sequence[str], widths: Sequence[int]
    ) -> float:
        """One KV-only batch per drafter: whoever was routed to it, and whoever's ring could overflow.

        Returns:
            Host seconds beyond what drafters that are used in every round spend on catching up, shared out by
            tokens. That overstates it: a pass costs little more for more tokens.
        """
        extra = 0.0
        for arm in self.watermarks.arms:
            chosen = [arm == route for route in routes]
            spans = self.watermarks.due(arm, row_ids, lengths, chosen, widths)
            seconds = self.seconds[arm] = self._ingest(arm, spans)
            usual = {
                r: n - self._routed.get(r, n) for r, n, c in zip(row_ids, lengths, chosen, strict=True) if c
            }
            ingested = sum(span.end - span.begin for span in spans)
            beyond = ingested - sum(min(usual.get(s.row, 0), s.end - s.begin) for s in spans)
            extra += seconds * beyond / max(ingested, 1)
        self._routed.update(zip(row_ids, lengths, strict=True))
        return extra

    def flush(self, row: int, end: int) -> None:
        """Ingest everything parked before position `end`: the request's slots may enter the tree."""
        for arm in self.watermarks.arms:
            begin = self.watermarks.synced(row, arm)
            if begin < end:
                self._ingest(arm, [Span(row, begin, end)])

    def forget(self, row: int) -> None:
        """The request in `row` is gone; what it parked is dropped."""
        self.watermarks.forget(row)
        self._routed.pop(row, None)

    def _ingest(self, arm: str, spans: Sequence[Span]) -> float:
        if not spans:
            return 0.0
        began = time.perf_counter()
        self._drafters[arm].catch_up(self.rings.unpark(spans, self._slot_table))
        for span in spans:
            self.watermarks.advance(span.row, arm, span.end)
        return time.perf_counter() - began
