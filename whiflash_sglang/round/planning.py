"""Plans a round on the host: routes, limits, candidates and catch-ups, sent to the device in one upload."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from whiflash_kernels import Drafts
from whiflash_kernels.cpu.texts import Batch

from whiflash_sglang.arms.base import Drafter, of_text, widest_of
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.device.transfers import Floats, Upload
from whiflash_sglang.drafts import arms
from whiflash_sglang.prices.round_clock import RoundClock
from whiflash_sglang.records.core import Limits, Plan, Round
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources
from whiflash_sglang.routing.controller import Controller


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans rounds from the results that the controller and drafters have seen; newer rounds may still be running."""

    drafters: Mapping[str, Drafter]
    sync: DraftSync
    controller: Controller
    clock: RoundClock
    quarantine: Quarantine
    sources: DraftSources
    ranks: Ranks = field(default_factory=Ranks)

    def plan(self, round_: Round) -> None:
        """Route every request, limit its drafts, plan catch-ups (their watermarks advance here) and upload the plan."""
        rids = [req.rid for req in round_.reqs]
        self.ranks.note(round_.row_ids, rids, round_.least, round_.most)
        round_.requests = list(map(self.controller.state, round_.row_ids, rids))
        self.sources.spending.begin(rids)
        round_.plan = self.ranks.broadcast(lambda: self._decide(round_))
        if not self.ranks.leads:
            round_.take_single(round_.plan.undrafted)
            # Drafters that draft from texts without proposing take notes when they are asked, so this rank asks them
            # too. The proposers' candidates were sent with the plan.
            for index, names in enumerate(round_.plan.asked):
                for drafter in (self.sources.of_text.get(arm) for arm in names):
                    if drafter is not None and not drafter.proposes:
                        self.sources.ask(round_, index, drafter)
        widths = [1 + most for most in round_.plan.limits.drafts]
        members = {arm: [i for i, route in enumerate(round_.plan.routes) if route == arm] for arm in self.drafters}
        round_.members = {arm: indices for arm, indices in members.items() if indices}
        round_.due = self.sync.due(round_.row_ids, round_.least, round_.most, round_.plan.routes, widths)
        for request, width in zip(round_.requests, widths, strict=True):
            request.under_way.append(width)
        self.ranks.note(round_.due)
        round_.decisions = [request.decision for request in round_.requests]
        self._upload(round_)

    def under_way(self, row: int) -> int:
        """Return the most rows that running rounds verify for the request in `row`."""
        request = self.controller.states.get(row)
        return 0 if request is None else sum(request.under_way)

    def _decide(self, round_: Round) -> Plan:
        """Fill the round's plan and return it, to be sent to the other ranks."""
        requests = round_.requests
        undrafted = [i for i, request in enumerate(requests) if self.sources.spending.is_dear(request.rid)]
        round_.take_single(undrafted)
        asked = [self._able(round_, i) for i in range(len(round_))]
        plan = round_.plan = Plan(undrafted, asked, self.controller.worth())
        plan.routes, batch = self._route(round_)
        costs = self.controller.costs
        plan.priced_as = [
            arms.PROMISED if arm == arms.NONE and request.decision.promised else arm
            for arm, request in zip(plan.routes, requests, strict=True)
        ]
        self.sources.extend(round_, batch)
        plan.limits = self._limits(round_)
        own = [request.wanted[arm] for request, arm in zip(requests, plan.priced_as, strict=True)]
        usual = [*map(min, plan.limits.drafts, map(costs.room, plan.priced_as, own))]
        for request, drafts in zip(requests, usual, strict=True):
            request.usual_rows = 1 + drafts
        plan.usual_drafts = costs.packed(len(round_), math.ceil(sum(usual)), sum(plan.limits.passes))
        plan.calibration = self._calibrations(round_)
        return plan

    def _rows(self, plan: Plan, arm: str) -> int:
        """Return the most rows of a request's pass. If drafts must pay for themselves, its route limits the pass."""
        rows = rows_of(self.drafters, arm)
        if arm not in self.drafters or not plan.worth.row:
            return rows
        return 1 + self.controller.costs.length(arm)

    def _limits(self, round_: Round) -> Limits[list[int]]:
        """Return each request's most drafts. A request that has ended keeps only the pass that was already planned."""
        plan, sources = round_.plan, self.sources
        passes = {arm: self._rows(plan, arm) - 1 for arm in set(plan.routes)}
        limits, drafted = [], [0] * len(round_)
        if plan.candidates is not None:
            drafted = plan.candidates.sizes.max(axis=1).tolist()
        each = zip(round_.requests, plan.routes, plan.asked, drafted, round_.budgets, strict=True)
        for request, route, asked, candidate, budget in each:
            most = budget - 1
            limit = min(passes[route], most)
            longest = copying = room = 0
            if request.running:
                for arm, drafter in sources.on_device.items():
                    if arm not in asked:
                        continue
                    if limit and request.may_join:
                        longest = max(longest, drafter.max_drafts, limit)
                    if request.may_verify(arm):
                        copying = min(drafter.max_drafts, most)
                room = max(limit, longest, copying, min(candidate, sources.widest))
            limits.append((limit, min(longest, most), copying, min(room, most)))
        return Limits(*map(list, zip(*limits, strict=True)))

    def _calibrations(self, round_: Round) -> dict[str, Floats]:
        """Return `Drafter.calibration` of every arm that may draft in the round, by arm."""
        by_arm = {}
        for arm, drafter in self.drafters.items():
            if (arm in round_.plan.routes or arm in self.sources.on_device) and arm not in self.quarantine:
                try:  # not `guard`, which takes a microsecond
                    by_arm[arm] = drafter.calibration(round_.requests, round_.plan.worth)
                except Exception as error:
                    self.quarantine.raised(arm, error)
        return by_arm

    def _able(self, round_: Round, index: int) -> list[str]:
        """Return the arms that may draft for a request in this round. Nothing else decides it.

        No arm may if the request has ended or may commit only one more token, the bonus token. Otherwise an arm may if
        no fault excludes it, the policy or a hint names it, its KV can catch up, and it serves the request's hints.
        """
        request = round_.requests[index]
        if round_.budgets[index] <= 1 or not request.running:
            return []
        serving = self.quarantine.serving(self.drafters, request)
        able, texts = (self.sync.able(request.row, self.controller.named(request, serving)), self.sources.of_text)
        return [arm for arm in able if arm not in texts or texts[arm].serves(request)]

    def _route(self, round_: Round) -> tuple[list[str], Batch | None]:
        """Return the route (arm or `none`) of each request, and the batch for `DraftSources.extend`. A request
        that ended after the scheduler put it into the batch gets `none` and no candidates.
        """
        routes = [arms.NONE] * len(round_)
        self.controller.costs.set_contexts(round_.most)
        running = [i for i, request in enumerate(round_.requests) if request.running]
        requests = [round_.requests[i] for i in running]
        before = [request.previous for request in requests]
        for i, request in zip(running, requests, strict=True):
            if request.tracker is not None:
                request.begin(partial(round_.answer, i))
        forecasts, batch = self.sources.propose(round_, joins=self.controller.policy.joins_arms)
        chosen = self.controller.route(requests, [forecasts[i] for i in running]) if running else []
        for i, old, new in zip(running, before, chosen, strict=True):
            routes[i] = new
            # With one token left a request is always routed to `none`, which is no switch.
            if old != new and old is not None and round_.budgets[i] > 1:
                self.clock.switches += 1
        return routes, batch

    def _upload(self, round_: Round) -> None:
        """Send the device the plan's limits, members, catch-ups, calibrations and candidates in one transfer."""
        plan = round_.plan
        if not round_.due and not any(plan.limits.drafts):
            round_.catches_up = round_.rows.new_empty(0)
            return
        upload = Upload()
        limits = [upload.ints(values) for values in plan.limits]
        members = {arm: upload.ints(indices) for arm, indices in round_.members.items()}
        due = upload.ints(self.sync.flags(round_.due, len(round_)))
        calibration = {arm: upload.floats(values) for arm, values in plan.calibration.items()}
        if (candidates := plan.candidates) is not None:
            arrays = candidates.tokens, candidates.sizes, candidates.at
            at = [upload.ints(each.ravel()) for each in arrays]
            alive_at = upload.floats(candidates.alive.ravel())
        sent = upload.send(round_.rows.device)
        round_.catches_up, round_.limits = sent[due], Limits(*(sent[place] for place in limits))
        round_.member_indices = {arm: sent[place] for arm, place in members.items()}
        round_.calibration = {arm: sent[place] for arm, place in calibration.items()}
        if candidates is not None:
            shape = candidates.tokens.shape
            ids, most, places = (sent[place] for place in at)
            drafts = Drafts(ids.view(shape), most.view(shape[:2]), sent[alive_at].view(shape))
            round_.host_drafts = drafts, places.view(shape[:2])


def rows_of(drafters: Mapping[str, Drafter], arm: str) -> int:
    """Return the most rows that a request priced as `arm` verifies: the arm's own drafts and the bonus token."""
    if arm == arms.PROMISED:
        return widest_of(of_text(drafters)) + 1
    return drafters[arm].max_drafts + 1 if arm in drafters else 1
