"""Keeping every drafter's KV synchronised, lazily. Imports no SGLang.

Ties the watermarks (what is due), the rings (what was parked) and the drafters (who ingests) together.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import sub

import numpy as np
import torch
from whiflash_kernels import Claims

from whiflash_sglang.arms.base import Drafter, with_kv
from whiflash_sglang.arms.length import CALIBRATION
from whiflash_sglang.cache.backlog import FeatureRings, FeatureRows, Watermarks
from whiflash_sglang.device.capture import CapturedPass, Recorder, doubling
from whiflash_sglang.device.transfers import Ints, Upload
from whiflash_sglang.records.core import Due
from whiflash_sglang.round.quarantine import Quarantine

FEWEST_ROWS = 4
"""Rows of the smallest captured catch-up: a pass over fewer costs what one over so many does."""


class DraftSync:
    """Watermarks and rings of all requests.

    Args:
        drafters: by arm; those that keep KV are synchronised.
        capacity: tokens of a ring, more than a round commits. width: columns of a captured row. dtype: of these.
        quarantine: knows whose KV has holes, who ingests nothing any more.
    """

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        capacity: int,
        width: int,
        dtype: torch.dtype,
        quarantine: Quarantine,
    ) -> None:
        self._drafters = with_kv(drafters)
        self._quarantine = quarantine
        self.arms = tuple(self._drafters)
        self._capacity, self._width, self._dtype = capacity if self.arms else 1, width, dtype
        self.seconds: dict[str, float] = {}
        """Host seconds of this round's catch-up, per arm."""
        self.caught_up = dict.fromkeys(self.arms, 0)
        """Tokens that each arm has ingested after others had drafted, at most."""
        self.leaving: list[tuple[int, int, Mapping[str, int]]] = []
        """Requests whose slots may be in the tree by now, without what is parked of them: row of the request table,
        tokens that keep their slots, and most of them that each arm has yet to ingest.
        """
        self._captured: dict[str, CapturedPass[None]] = {}
        self._claims: Claims | None = None  # what these read
        self._tailless: set[int] = set()
        """Rows of requests that came without feature n-1, until a round has given them one."""
        self.verifying: deque[int] = deque()
        """Rows that each round verifies whose results are not known yet."""
        self._routed: dict[int, int] = {}
        """Length when the last round was planned, per row."""
        self._last: dict[int, int] = {}
        """Tokens that the round before it committed, per row, at most."""

    def bytes_for(self, rows: int) -> int:
        """Bytes that `allocate` will take."""
        rings = FeatureRings.bytes_for(rows, self._capacity, self._width, self._dtype)
        return rings + rows * len(self.arms) * torch.int64.itemsize

    def captured_bytes(self, requests: int) -> int:
        """Bytes that captured passes of so many requests read: the inputs of catch-ups and those of drafts."""
        tails = sum(drafter.tail_width for drafter in self._drafters.values())
        # Four of a draft, a catch-up's rows, and where each arm begins and ends.
        numbers = 5 + 2 * len(self.arms)
        each = numbers * torch.int64.itemsize + tails * self._dtype.itemsize
        return requests * each + CALIBRATION * torch.float32.itemsize

    def allocate(self, slot_table: torch.Tensor) -> None:
        """Allocate one ring per row of `slot_table` [rows, ctx] int32 (request row and position → KV slot)."""
        self._slot_table = slot_table
        rows, device = int(slot_table.shape[0]), slot_table.device
        self.rings = FeatureRings(rows, self._capacity, self._width, self._dtype, device)
        self.watermarks = Watermarks(self.arms, self._capacity, rows, device)

    def prefill(
        self,
        prompt: FeatureRows,
        row_ids: Sequence[int],
        lengths: Sequence[int],
        rows: torch.Tensor,
        last_rows: torch.Tensor,
    ) -> None:
        """Write both drafters' KV of an extend batch now: the radix tree takes the slots next.

        Args:
            prompt: the batch's packed rows, with its `runs`. lengths: tokens of each request with it. rows: [B] request
                rows. last_rows: [B], the last packed row of each.
        """
        if any(drafter.attends_text for drafter in self._drafters.values()):
            packed = torch.arange(len(prompt), device=rows.device)
            requests = rows[torch.searchsorted(last_rows, packed)]
            prompt = replace(prompt, requests=requests, slot_table=self._slot_table)
        for arm, drafter in self._drafters.items():
            if self._quarantine.ingests(arm):
                with self._quarantine.guard_ingestion(arm):
                    drafter.catch_up(prompt.of(drafter.features))
        tails = prompt.positions[last_rows]
        one = torch.ones_like(tails)
        self.rings.park(prompt.features, prompt.next_tokens, rows, tails, one, last_rows, widest=1)
        self.watermarks.put(rows, tails + 1)
        self._begin(row_ids, lengths)

    def adopt(
        self, row_ids: Sequence[int], lengths: Sequence[int], rows: torch.Tensor, on_device: torch.Tensor
    ) -> None:
        """Requests came with all drafters' KV, and without feature n-1.

        Args:
            lengths: n of each, on_device: the same, [B] int64. rows: [B] request rows.
        """
        self.watermarks.put(rows, on_device)
        self._begin(row_ids, lengths)
        self._tailless.update(row_ids)

    def able(self, row: int, names: list[str]) -> list[str]:
        """Arms of `names` of which a draft for the request in `row` has what it begins with."""
        if row not in self._tailless:
            return names
        return [arm for arm in names if arm not in self._drafters or not self._drafters[arm].tail_width]

    def _begin(self, row_ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Requests have so many tokens, up to which nobody has anything to ingest."""
        for row, length in zip(row_ids, lengths, strict=True):
            self.watermarks.reset(row, length)
            self._routed[row] = length

    def due(
        self,
        row_ids: Sequence[int],
        least: Sequence[int],
        most: Sequence[int],
        routes: Sequence[str],
        widths: Sequence[int],
    ) -> Due:
        """Requests to catch up with each arm before a round: those routed to it, and those with a ring that could
        overflow.

        It counts as done from now on, so `catch_up` must follow. The round parks a last feature of each.

        Args:
            least, most: bounds of each request's n. widths: rows that it may verify in the round.
        """
        before = map(self._routed.get, row_ids, most)
        self._last.update(zip(row_ids, map(sub, most, before), strict=True))
        self._routed.update(zip(row_ids, most, strict=True))
        self._tailless.difference_update(row_ids)
        by_arm, verifying = {}, sum(self.verifying) or None
        for arm in self.arms:
            chosen = [arm == route for route in routes]
            members, tokens = self.watermarks.due(arm, row_ids, least, most, chosen, widths, verifying)
            if tokens:
                by_arm[arm] = members, tokens
        return by_arm

    def flags(self, due: Due, size: int) -> Ints:
        """`due` of `size` requests as the device takes it: [arms * B], 1 where an arm catches up."""
        flags = np.zeros((len(self.arms), size), dtype=np.int64)
        for number, arm in enumerate(self.arms):
            if arm in due:
                flags[number, due[arm][0]] = 1
        return flags.ravel()

    def catch_up(self, due: Due, flags: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor) -> None:
        """One KV-only batch per drafter that is due.

        Args:
            flags: `flags(due)` on the device, [arms * B] int64. rows, starts: [B] int64, of the whole batch.
        """
        self.seconds = {}
        if not due:
            return
        began = time.perf_counter()
        claims = self.watermarks.claim(rows, starts, flags.view(len(self.arms), -1), self._place(len(rows)))
        for arm, (_, most) in due.items():
            self._ingest(arm, claims, most)
            self.seconds[arm] = time.perf_counter() - began
            began = time.perf_counter()

    def beyond_usual(self, due: Due, row_ids: Sequence[int], routes: Sequence[str]) -> float:
        """Host seconds of the last `catch_up` beyond what drafters used in every round spend on it, by tokens.

        That overstates it: a pass costs little more for more tokens.
        """
        extra = 0.0
        for arm, (members, ingested) in due.items():
            usual = sum(self._last.get(row_ids[i], 0) for i in members if routes[i] == arm)
            extra += self.seconds[arm] * max(ingested - usual, 0) / ingested
        return extra

    def leave(self, row: int, end: int) -> None:
        """The request's slots up to position `end` may enter the tree: `flush` ingests what is parked of them."""
        missing = {arm: min(end - self.watermarks.synced(row, arm), self._capacity) for arm in self.arms}
        missing = {arm: most for arm, most in missing.items() if most > 0}
        for arm in missing:
            self.watermarks.flushed(row, arm, end)
        if missing:
            self.leaving.append((row, end, missing))

    def flush(self) -> None:
        """Ingest everything parked of requests that leave: one upload, and one batch per drafter, for all of them.

        It must be issued before anything is written to their rows of the slot table.
        """
        leaving, self.leaving = self.leaving, []
        due = {}
        for arm in self.arms:
            most = {i: missing[arm] for i, (_, _, missing) in enumerate(leaving) if arm in missing}
            if most:
                due[arm] = list(most), sum(most.values())
        upload = Upload()
        at = [upload.ints([row for row, _, _ in leaving]), upload.ints([end for _, end, _ in leaving])]
        flags_at = upload.ints(self.flags(due, len(leaving)))
        ints, _ = upload.send(self.watermarks.device.device)
        rows, ends = (ints[i] for i in at)
        # A round that was under way when its request ended may have gone further already: then nothing is left.
        flags = ints[flags_at].view(len(self.arms), -1)
        claims = self.watermarks.claim(rows, ends, flags, self._place(len(rows)))
        for arm, (_, tokens) in due.items():
            self._ingest(arm, claims, tokens)

    def backlog(self) -> dict[str, int]:
        """Tokens of running requests that each arm has yet to ingest, at most."""
        known = [(row, n) for row, n in self._routed.items() if self.watermarks.known(row)]
        return {
            arm: sum(max(n - self.watermarks.synced(row, arm), 0) for row, n in known) for arm in self.arms
        }

    def forget(self, row: int) -> None:
        """The request in `row` is gone; what it parked is dropped."""
        self.watermarks.forget(row)
        self._tailless.discard(row)
        self._routed.pop(row, None)
        self._last.pop(row, None)

    @property
    def rows(self) -> set[int]:
        """Rows that something is kept of, also of requests that have left and are not flushed."""
        left = (row for row, _, _ in self.leaving)
        return {*self.watermarks.rows, *self._tailless, *self._routed, *self._last, *left}

    def capture(self, recorder: Recorder, requests: int, rows: int) -> None:
        """Have catch-ups captured for up to so many requests and up to `rows` rows together.

        Raises ConfigError where they cannot be captured.
        """
        # Row 0 is nobody's: it has no backlog.
        members = torch.zeros(requests, dtype=torch.int64, device=self._slot_table.device)
        begins, ends = (members.new_zeros(len(self.arms), requests) for _ in range(2))
        self._claims = Claims(members, begins, ends)
        for arm in self.arms:
            self._captured[arm] = CapturedPass(
                f"the catch-up of {arm!r}", partial(self._pass, arm, self._claims), self.sizes(rows), recorder
            )

    def sizes(self, rows: int) -> list[int]:
        """Numbers of rows that catch-ups are captured for, of up to so many."""
        return doubling(FEWEST_ROWS, rows)

    def idle(self, arm: str, tokens: int) -> Callable[[], None]:
        """A call that ingests `tokens` tokens that nobody has parked, to time it before the first request."""
        each = min(tokens, self._capacity)
        rows = torch.arange(1, -(-tokens // each) + 1, device=self._slot_table.device)
        ends = (tokens - (rows - 1) * each).clamp(max=each)
        every = torch.ones(len(self.arms), len(rows), dtype=torch.int64, device=rows.device)
        claims = self.watermarks.claim(rows, ends, every, self._place(len(rows)))
        self.watermarks.put(rows, torch.zeros_like(rows))
        return partial(self._issue, arm, claims, tokens)

    def _place(self, requests: int) -> Claims | None:
        """Claims that captured catch-ups of so many requests read; None: nothing is replayed for them."""
        return self._claims if self._claims and requests <= len(self._claims.request_slots) else None

    def _ingest(self, arm: str, claims: Claims, most: int) -> None:
        """Ingest the tokens that requests parked between the watermarks of `arm`, at most `most`."""
        if not self._quarantine.ingests(arm):
            return
        self.caught_up[arm] += most
        with self._quarantine.guard_ingestion(arm):
            self._issue(arm, claims, most)

    def _issue(self, arm: str, claims: Claims, most: int) -> None:
        """`_pass`, replayed where it was captured: `claims` are at their `_place` then."""
        captured = self._captured.get(arm) if self._place(len(claims.request_slots)) else None
        if captured is not None and captured.size_for(most) is not None:
            captured.replay(most)
        else:
            self._pass(arm, claims, most)

    def _pass(self, arm: str, claims: Claims, most: int) -> None:
        """Everything that requests parked between where `arm` begins and ends, at most `most` rows."""
        drafter, number = self._drafters[arm], self.arms.index(arm)
        drafter.catch_up(
            self.rings.unpark(
                claims.request_slots,
                claims.begins[number],
                claims.ends[number],
                self._slot_table,
                rows=most,
                wanted=drafter.features,
                owned=drafter.attends_text,
            )
        )
