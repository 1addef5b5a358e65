"""Lazy catch-up: each drafter ingests the target's features only when it drafts or a ring is full. Imports no SGLang.

`DraftSync` connects watermarks (up to where a drafter's KV is valid), rings (parked features) and drafters.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import sub

import numpy as np
import torch
from whiflash_kernels import Claims, claim_backlogs

from whiflash_sglang.arms.base import Drafter, with_kv
from whiflash_sglang.arms.length import CALIBRATION
from whiflash_sglang.cache.backlog import FeatureRings, FeatureRows, Watermarks
from whiflash_sglang.device.capture import CapturedPass, Recorder, doubling
from whiflash_sglang.device.transfers import Ints, Upload
from whiflash_sglang.records.core import Due
from whiflash_sglang.round.quarantine import Quarantine

FEWEST_ROWS = 4
"""Rows of the smallest captured catch-up: a pass over fewer rows takes as long."""


class DraftSync:
    """Keeps the KV of all drafters up to date: the watermarks and feature rings of all requests.

    Args:
        drafters: by arm; only those that keep KV are synchronised.
        capacity: tokens per ring, more than a round commits. width, dtype: columns and dtype of a feature row.
        quarantine: knows the drafters that ingest nothing any more.
    """

    def __init__(
        self, drafters: Mapping[str, Drafter], capacity: int, width: int, dtype: torch.dtype, quarantine: Quarantine
    ) -> None:
        self._drafters = with_kv(drafters)
        self._quarantine = quarantine
        self.arms = tuple(self._drafters)
        self._capacity, self._width, self._dtype = capacity if self.arms else 1, width, dtype
        self.seconds: dict[str, float] = {}
        """Host seconds of this round's catch-up, per arm."""
        self.caught_up = dict.fromkeys(self.arms, 0)
        """Upper bound of the tokens that each arm has ingested in catch-ups since the start."""
        self.leaving: list[tuple[int, int, Mapping[str, int]]] = []
        """Requests whose slots may be in the radix tree while features are still parked: row of the request table,
        number of tokens that keep their slots, and by arm the most tokens that it must still ingest.
        """
        self._captured: dict[str, CapturedPass[None]] = {}
        self._claims: Claims | None = None  # the tensors that captured catch-ups read
        self._tailless: set[int] = set()
        """Request rows without a parked feature n-1 (another server computed the prompt), until their first round."""
        self.verifying: deque[int] = deque()
        """Number of verified rows of each round whose results the host does not know yet."""
        self._routed: dict[int, int] = {}
        """By request row, the largest possible n when the newest round was planned."""
        self._last: dict[int, int] = {}
        """By request row, the most tokens that the round before the newest one committed."""

    def bytes_for(self, rows: int) -> int:
        """Return the bytes that `allocate` takes for `rows` request rows."""
        rings = FeatureRings.bytes_for(rows, self._capacity, self._width, self._dtype)
        return rings + rows * len(self.arms) * torch.int64.itemsize

    def captured_bytes(self, requests: int) -> int:
        """Return the bytes of the inputs that captured catch-ups and draft passes of `requests` requests read."""
        tails = sum(drafter.tail_width for drafter in self._drafters.values())
        # Four numbers for a draft pass, the request row for a catch-up, and each arm's begin and end there.
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
        """Write every drafter's KV for an extend batch now, because the radix tree takes the slots next.

        Args:
            prompt: the batch's packed rows, with its `runs`. row_ids, rows: request rows on the host and on the device,
                [B]. lengths: tokens of each request after this prefill. last_rows: [B], last packed row of each.
        """
        if any(drafter.attends_text for drafter in self._drafters.values()):
            packed = torch.arange(len(prompt), device=rows.device)
            requests = rows[torch.searchsorted(last_rows, packed)]
            prompt = replace(prompt, requests=requests, slot_table=self._slot_table)
        for arm, drafter in self._drafters.items():
            if arm not in self._quarantine:
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
        """Begin requests of n tokens that a prefill server computed: all drafters' KV is there, but not feature n-1.

        Args:
            row_ids, rows: request rows on the host and on the device, [B]. lengths, on_device: n of each, likewise.
        """
        self.watermarks.put(rows, on_device)
        self._begin(row_ids, lengths)
        self._tailless.update(row_ids)

    def able(self, row: int, names: list[str]) -> list[str]:
        """Return the arms of `names` that can draft for the request in `row`: not those that read a missing feature.

        The feature of the prompt's last token is missing until the first round if another server computed the prompt.
        """
        if row not in self._tailless:
            return names
        return [arm for arm in names if arm not in self._drafters or not self._drafters[arm].tail_width]

    def _begin(self, row_ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Set the host's watermarks of all drafters to the requests' lengths: nothing is left to ingest."""
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
        """Return the requests that each arm must catch up before a round: those routed to it, and those whose ring
        could overflow.

        The watermarks advance here, so `catch_up` must follow. The round parks a new feature n-1 of each request.

        Args:
            least, most: bounds of each request's n. routes: arm of each. widths: most rows that each verifies.
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
        """Convert `due` of `size` requests for the device: [arms * B] int64, 1 if an arm catches up the request."""
        flags = np.zeros((len(self.arms), size), dtype=np.int64)
        for number, arm in enumerate(self.arms):
            if arm in due:
                flags[number, due[arm][0]] = 1
        return flags.ravel()

    def catch_up(self, due: Due, flags: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor) -> None:
        """Run one KV-only batch for each drafter that is due.

        Args:
            flags: `flags(due)` on the device, [arms * B] int64. rows, starts: request rows and n of the whole batch,
                [B] int64.
        """
        self.seconds = {}
        if not due:
            return
        began = time.perf_counter()
        claims = self._claim(rows, starts, flags)
        for arm, (_, most) in due.items():
            self._ingest(arm, claims, most)
            self.seconds[arm] = time.perf_counter() - began
            began = time.perf_counter()

    def beyond_usual(self, due: Due, row_ids: Sequence[int], routes: Sequence[str]) -> float:
        """Return the host seconds that switching between drafters added to the last `catch_up`.

        A drafter used in every round ingests only the last round's tokens, so the seconds of all further tokens count.
        Seconds are split by tokens, which overstates the cost: a pass takes little longer for more tokens.
        """
        extra = 0.0
        for arm, (members, ingested) in due.items():
            usual = sum(self._last.get(row_ids[i], 0) for i in members if routes[i] == arm)
            extra += self.seconds[arm] * max(ingested - usual, 0) / ingested
        return extra

    def leave(self, row: int, end: int) -> None:
        """Note that the slots of `row` up to position `end` may enter the tree: `flush` ingests their features."""
        missing = {arm: min(end - self.watermarks.synced(row, arm), self._capacity) for arm in self.arms}
        missing = {arm: most for arm, most in missing.items() if most > 0}
        for arm in missing:
            self.watermarks.flushed(row, arm, end)
        if missing:
            self.leaving.append((row, end, missing))

    def flush(self) -> None:
        """Ingest all parked features of the requests in `leaving`, with one upload and one batch per drafter.

        Call it before anything is written to these requests' rows of the slot table.
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
        ints = upload.send(self.watermarks.device.device)
        rows, ends = (ints[i] for i in at)
        # A round still running when its request ended may have moved the watermark past `end`; then nothing is left.
        claims = self._claim(rows, ends, ints[flags_at])
        for arm, (_, tokens) in due.items():
            self._ingest(arm, claims, tokens)

    def backlog(self) -> dict[str, int]:
        """Return, by drafter, how many tokens of running requests it has yet to write to its KV, at most."""
        known = [(row, n) for row, n in self._routed.items() if row in self.watermarks.rows]
        return {arm: sum(max(n - self.watermarks.synced(row, arm), 0) for row, n in known) for arm in self.arms}

    def forget(self, row: int) -> None:
        """Drop the watermarks, and with them the parked features, of the request in `row`, which has left."""
        self.watermarks.forget(row)
        self._tailless.discard(row)
        self._routed.pop(row, None)
        self._last.pop(row, None)

    @property
    def rows(self) -> set[int]:
        """Request rows with any state here, including requests that have left and are not flushed yet."""
        left = (row for row, _, _ in self.leaving)
        return {*self.watermarks.rows, *self._tailless, *self._routed, *self._last, *left}

    def capture(self, recorder: Recorder, requests: int, rows: int) -> None:
        """Capture each arm's catch-up for up to `requests` requests with up to `rows` rows in all.

        Raises ConfigError if they cannot be captured.
        """
        # Captures begin with request row 0, which no request has, so they ingest nothing.
        members = torch.zeros(requests, dtype=torch.int64, device=self._slot_table.device)
        begins, ends = (members.new_zeros(len(self.arms), requests) for _ in range(2))
        self._claims = Claims(members, begins, ends)
        for arm in self.arms:
            self._captured[arm] = CapturedPass(
                f"the catch-up of {arm!r}", partial(self._pass, arm, self._claims), self.sizes(rows), recorder
            )

    def sizes(self, rows: int) -> list[int]:
        """Return the row counts that catch-ups are captured for: doubled from FEWEST_ROWS up to `rows`."""
        return doubling(FEWEST_ROWS, rows)

    def idle(self, arm: str, tokens: int) -> Callable[[], None]:
        """Return a call that ingests `tokens` made-up tokens, to time a catch-up before the first request."""
        each = min(tokens, self._capacity)
        rows = torch.arange(1, -(-tokens // each) + 1, device=self._slot_table.device)
        ends = (tokens - (rows - 1) * each).clamp(max=each)
        claims = self._claim(rows, ends, rows.new_ones(len(self.arms) * len(rows)))
        self.watermarks.put(rows, torch.zeros_like(rows))
        return partial(self._issue, arm, claims, tokens)

    def _claim(self, rows: torch.Tensor, lengths: torch.Tensor, flags: torch.Tensor) -> Claims:
        """Move the watermarks of arms that catch up to n, and return the positions that every arm has to ingest.

        rows: [B] int64 request rows. lengths: [B] int64, n. flags: [arms * B] int64, 1 where an arm catches up.
        """
        due, into = flags.view(len(self.arms), -1), self._place(len(rows))
        return claim_backlogs(self.watermarks.device, rows, lengths, due, into=into)

    def _place(self, requests: int) -> Claims | None:
        """Return the tensors that captured catch-ups read; None if `requests` requests are more than captured ones."""
        return self._claims if self._claims and requests <= len(self._claims.request_slots) else None

    def _ingest(self, arm: str, claims: Claims, most: int) -> None:
        """Have `arm` ingest the parked tokens that `claims` names, at most `most`, unless it is quarantined."""
        if arm in self._quarantine:
            return
        self.caught_up[arm] += most
        with self._quarantine.guard_ingestion(arm):
            self._issue(arm, claims, most)

    def _issue(self, arm: str, claims: Claims, most: int) -> None:
        """Run `_pass`, as a graph replay if one was captured: then `claims` are the tensors of `_place`."""
        captured = self._captured.get(arm) if self._place(len(claims.request_slots)) else None
        if captured is not None and captured.size_for(most) is not None:
            captured.replay(most)
        else:
            self._pass(arm, claims, most)

    def _pass(self, arm: str, claims: Claims, most: int) -> None:
        """Gather the parked rows of `arm` between its begins and ends, at most `most`, and have it ingest them."""
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
