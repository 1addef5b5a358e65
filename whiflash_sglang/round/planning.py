"""What the host decides of a round before it runs, in one object, and all that the device needs of it in one upload."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import Due
from whiflash_sglang.core import RoundBatch
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.device.transfers import Upload
from whiflash_sglang.drafters.base import Drafter
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.plan import Decided, OnDevice, Plan
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.controller import Controller, Forecasts
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.routing.signals import Forecast
from whiflash_sglang.telemetry.round_clock import RoundClock


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans rounds from what the controller and the drafters know, which may be late."""

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    controller: Controller
    clock: RoundClock
    quarantine: Quarantine
    ranks: Ranks = field(default_factory=Ranks)

    def plan(self, requests: RoundBatch) -> Plan:
        """Route every request, and say what the round takes for it; what catches up counts as done from now on."""
        self.quarantine.tick()
        self.ranks.note(requests.names, requests.lengths)
        decided = self.ranks.broadcast(lambda: self._decide(requests))
        if not self.ranks.leads:
            self._ask_too(requests, decided.asked, decided.worth)
        routes, late = decided.routes, self._late
        limits, late_limits = self._limits(requests, routes), self._late_limits(requests, decided.must_beat)
        rooms = [max(most) for most in zip(limits, decided.joined, late_limits, strict=True)]
        widths = [1 + room for room in rooms]
        members = {arm: [i for i, route in enumerate(routes) if route == arm] for arm in self.drafters}
        members = {arm: indices for arm, indices in members.items() if indices and arm != late}
        due = self.sync.due(requests.row_ids, requests.lengths, routes, widths)
        states = [self.controller.state(row, rid) for row, rid in requests.names]
        for state, width in zip(states, widths, strict=True):
            state.under_way.append(width)
        self.ranks.note(due)
        return Plan(
            routes,
            states,
            [state.decision for state in states],
            members,
            due,
            limits,
            decided.joined,
            late if any(late_limits) else None,
            late_limits,
            decided.expected_drafts,
            decided.worth,
            self._upload(requests, members, due, (limits, decided.joined, late_limits), decided),
        )

    def under_way(self, row: int) -> int:
        """Rows that are being verified for the request in `row`, at most."""
        state = self.controller.states.get(row)
        return 0 if state is None else sum(state.under_way)

    @property
    def _late(self) -> str | None:
        late = (arm for arm, drafter in self.drafters.items() if drafter.late)
        return next((arm for arm in late if arm not in self.quarantine), None)

    def _decide(self, requests: RoundBatch) -> Decided:
        asked = [self._askable(requests, i) for i in range(len(requests.row_ids))]
        worth = {arm: self.controller.worth(arm) for arm in self.drafters}
        routes, late = self._route(requests, asked, worth), self._late
        limits = self._limits(requests, routes)
        joined = [
            self._joined(requests, i, arm, limit) if limit and self.drafters[arm].judges else 0
            for i, (arm, limit) in enumerate(zip(routes, limits, strict=True))
        ]
        must_beat = [
            self.controller.must_beat(row, route, late)
            if late and budget > 1 and self._takes(late, row, rid)
            else math.inf
            for (row, rid), route, budget in zip(requests.names, routes, requests.budgets, strict=True)
        ]
        return Decided(
            routes,
            asked,
            joined,
            must_beat,
            [self.controller.costs.drafts(arm) for arm in routes],
            worth,
            self._calibrations(requests.row_ids, routes),
        )

    def _takes(self, late: str, row: int, rid: str) -> bool:
        """Whether the request takes drafts of the late arm."""
        serves = self.quarantine.serves(late, rid) and self.drafters[late].serves(row)
        return serves and self.controller.holds(row, rid)

    def _calibrations(self, row_ids: Sequence[int], routes: Sequence[str]) -> dict[str, list[float]]:
        """What drafts of the round are judged by, of every arm that may make some."""
        found = {}
        for arm, drafter in self.drafters.items():
            if (arm in routes or drafter.late) and arm not in self.quarantine:
                with self.quarantine.guard(arm):
                    found[arm] = list(drafter.calibration(row_ids))
        return found

    def _limits(self, requests: RoundBatch, routes: Sequence[str]) -> list[int]:
        """Drafts of each request's own arm at most; the late arm drafts for all."""
        return [
            min(self.drafters[arm].max_drafts, budget - 1)
            if arm in self.drafters and arm != self._late
            else 0
            for arm, budget in zip(routes, requests.budgets, strict=True)
        ]

    def _late_limits(self, requests: RoundBatch, must_beat: Sequence[float]) -> list[int]:
        late = self._late
        return [
            min(self.drafters[late].max_drafts, budget - 1) if late and value < math.inf else 0
            for value, budget in zip(must_beat, requests.budgets, strict=True)
        ]

    def _askable(self, requests: RoundBatch, index: int) -> list[str]:
        """Arms that may draft for a request, if they have anything to propose; none for one that has ended."""
        # The last token a request may commit needs no draft: it is the bonus token.
        if requests.budgets[index] <= 1 or not self.controller.holds(*requests.names[index]):
            return []
        row, rid = requests.names[index]
        serving = [arm for arm in self.drafters if self.quarantine.serves(arm, rid)]
        return [arm for arm in serving if self.controller.may_name(row, arm)]

    def _forecast(
        self, requests: RoundBatch, index: int, asked: Sequence[str], worth: Mapping[str, Worth]
    ) -> Forecasts:
        """Those of `asked` that propose something, with what they say of it."""
        (row, rid), n = requests.names[index], requests.lengths.most[index]
        history = partial(requests.history, index)
        found: dict[str, Forecast | None] = {}
        for arm in asked:
            if arm in self.quarantine:
                continue  # since an earlier request of the batch was asked
            try:
                found[arm] = self.drafters[arm].forecast(row, n, history, worth[arm])
            except Exception as error:
                self.quarantine.raised(arm, error, rid)
        return {arm: forecast for arm, forecast in found.items() if forecast is None or forecast.length > 1}

    def _ask_too(
        self, requests: RoundBatch, asked: Sequence[Sequence[str]], worth: Mapping[str, Worth]
    ) -> None:
        """Where another rank decides: what drafters find while they are asked is what they draft later."""
        for index, names in enumerate(asked):
            self._forecast(requests, index, names, worth)

    def _route(
        self, requests: RoundBatch, asked: Sequence[Sequence[str]], worth: Mapping[str, Worth]
    ) -> list[str]:
        """An arm for each request; none for one that ended after the scheduler had put it into the batch."""
        running = [i for i, name in enumerate(requests.names) if self.controller.holds(*name)]
        rows, lengths = requests.row_ids, requests.lengths.most
        before = [self.controller.states[rows[i]].previous for i in running]
        routes = [arms.NONE] * len(rows)
        self.controller.costs.set_contexts(lengths)
        for i in running:
            self.controller.states[rows[i]].begin(partial(requests.answer, i))
        if running:
            found = self.controller.route(
                [rows[i] for i in running],
                [self._forecast(requests, i, asked[i], worth) for i in running],
            )
            for i, old, new in zip(running, before, found, strict=True):
                routes[i] = new
                # Before its last token a request has nothing to switch to.
                self.clock.switches += requests.budgets[i] > 1 and old not in (None, new)
        return routes

    def _joined(self, requests: RoundBatch, index: int, arm: str, limit: int) -> int:
        """Drafts of a request at most, its own arm's and those behind them; 0 where nobody may prolong them."""
        if not self.controller.may_join(requests.row_ids[index]):
            return 0
        row, rid = requests.names[index]
        longest = max(
            (
                drafter.max_drafts
                for other, drafter in self.drafters.items()
                if drafter.prolongs
                and other != arm
                and self.quarantine.serves(other, rid)
                and drafter.serves(row)
            ),
            default=0,
        )
        return min(max(longest, limit), requests.budgets[index] - 1) if longest else 0

    def _upload(
        self,
        requests: RoundBatch,
        members: Mapping[str, Sequence[int]],
        due: Mapping[str, Due],
        most: Sequence[Sequence[int]],
        decided: Decided,
    ) -> OnDevice:
        if not due and not any(map(any, most)):
            nothing = requests.rows.new_empty(0)
            return OnDevice({}, nothing, nothing, nothing, {}, nothing, nothing)
        upload = Upload()
        most_at = [upload.ints(own) for own in most]
        members_at = {arm: upload.ints(indices) for arm, indices in members.items()}
        due_at = upload.ints(self.sync.flags(due, len(requests.row_ids)))
        calibration_at = {arm: upload.floats(own) for arm, own in decided.calibration.items()}
        must_beat_at = upload.floats(decided.must_beat)
        ints, floats = upload.send(requests.rows.device)
        return OnDevice(
            {arm: ints[at] for arm, at in members_at.items()},
            ints[due_at],
            ints[most_at[0]],
            ints[most_at[1]],
            {arm: floats[at] for arm, at in calibration_at.items()},
            ints[most_at[2]],
            floats[must_beat_at],
        )


def rows_of(drafters: Mapping[str, Drafter], arm: str) -> int:
    """Most rows that a request routed to `arm` verifies, of the arm's own drafts."""
    return drafters[arm].max_drafts + 1 if arm in drafters else 1


def drafts_nothing(routes: Sequence[str]) -> bool:
    """Whether every request decodes plainly."""
    return all(arm == arms.NONE for arm in routes)
