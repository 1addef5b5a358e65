"""What the host decides of a round before it runs, in one object, and all that the device needs of it in one upload."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from whiflash_kernels import HostDrafts

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import Due
from whiflash_sglang.core import SILENCE, RoundBatch, Voice
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.device.transfers import Floats, HostView, Upload
from whiflash_sglang.drafters.base import Drafter, laid, widest_of
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.plan import Decided, OnDevice, Plan
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.voices import Voices
from whiflash_sglang.routing.controller import Controller
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
    voices: Voices
    host: HostView
    ranks: Ranks = field(default_factory=Ranks)

    def plan(self, requests: RoundBatch) -> Plan:
        """Route every request, and say what the round takes for it; what catches up counts as done from now on."""
        self.quarantine.tick()
        self.ranks.note(requests.names, requests.lengths)
        decided = self.ranks.broadcast(lambda: self._decide(requests))
        if not self.ranks.leads:
            self._ask_too(requests, decided.asked, decided.worth)
        routes, limits = decided.routes, decided.limits
        longest = widest_of(self.drafters)
        said = [
            min(longest, budget - 1, max(len(voice.tokens) for voice in own.values()))
            if own and not self.host.exact
            else 0
            for own, budget in zip(decided.voices, requests.budgets, strict=True)
        ]
        rooms = [max(most) for most in zip(limits, decided.joined, decided.copying, said, strict=True)]
        widths = [1 + room for room in rooms]
        members = {arm: [i for i, route in enumerate(routes) if route == arm] for arm in self.drafters}
        members = {arm: own for arm, own in members.items() if own and arm not in self.voices.speaking}
        due = self.sync.due(requests.row_ids, requests.lengths, routes, widths)
        states = [self.controller.state(row, rid) for row, rid in requests.names]
        for state, width in zip(states, widths, strict=True):
            state.under_way.append(width)
        self.ranks.note(due)
        speakers = list(self.voices.speaking)
        most = limits, decided.joined, decided.copying, rooms
        return Plan(
            routes,
            states,
            [state.decision for state in states],
            members,
            due,
            limits,
            decided.joined,
            decided.copying,
            rooms,
            decided.made_room,
            decided.voices,
            [*speakers, *self.voices.on_device],
            decided.worth,
            self._upload(requests, members, due, most, decided, speakers),
        )

    def under_way(self, row: int) -> int:
        """Rows that are being verified for the request in `row`, at most."""
        state = self.controller.states.get(row)
        return 0 if state is None else sum(state.under_way)

    def _decide(self, requests: RoundBatch) -> Decided:
        asked = [self._askable(requests, i) for i in range(len(requests.row_ids))]
        worth = {arm: self.controller.worth(arm) for arm in self.drafters}
        routes, voices = self._route(requests, asked, worth)
        limits = self._limits(requests, routes)
        beside = [self._beside(requests, i, *own) for i, own in enumerate(zip(routes, limits, strict=True))]
        if not self.host.exact:
            voices = [
                self._substitutes(requests, i, routes[i], own, worth) if own else own
                for i, own in enumerate(voices)
            ]
        return Decided(
            routes,
            asked,
            limits,
            [joined for joined, _ in beside],
            [copying for _, copying in beside],
            [self.controller.costs.room(arm) for arm in routes],
            voices,
            worth,
            self._calibrations(requests.row_ids, routes),
        )

    def _substitutes(
        self,
        requests: RoundBatch,
        index: int,
        route: str,
        voices: Mapping[str, Voice],
        worth: Mapping[str, Worth],
    ) -> dict[str, Voice]:
        """What may take the place of drafts, each with what other arms know to follow it."""
        name = row, _ = requests.names[index]
        room = widest_of(self.drafters) + self.under_way(row)
        found = {}
        for arm, voice in voices.items():
            if self.controller.takes(row, route, arm):
                extend = self.controller.may_join(row)
                own = self.voices.extended(name, arm, voice, room, worth)[0] if extend else voice
                if not self.voices.found_on_device(arm, own):
                    found[arm] = own
        return found

    def _beside(self, requests: RoundBatch, index: int, route: str, limit: int) -> tuple[int, int]:
        """Drafts of a request at most, its own arm's and those behind them, 0 where nobody may extend them; and copies
        at most that the device may put in their place.
        """
        (row, rid), budget, controller = requests.names[index], requests.budgets[index], self.controller
        joins = limit and self.drafters[route].judges and controller.may_join(row)
        longest = copying = 0
        for arm in self.quarantine.serving(self.voices.of_text, rid):
            drafter = self.voices.of_text[arm]
            if not drafter.serves(row):
                continue
            if joins and arm != route and arm in self.voices.speaking:
                longest = max(longest, drafter.max_drafts)
            if (
                arm in self.voices.on_device
                and controller.holds(row, rid)
                and controller.takes(row, route, arm)
            ):
                copying = min(drafter.max_drafts, budget - 1)
        return min(max(longest, limit), budget - 1) if longest else 0, copying

    def _calibrations(self, row_ids: Sequence[int], routes: Sequence[str]) -> dict[str, Floats]:
        """What drafts of the round are judged by, of every arm that may make some."""
        found = {}
        for arm, drafter in self.drafters.items():
            if (arm in routes or arm in self.voices.on_device) and arm not in self.quarantine:
                with self.quarantine.guard(arm):
                    found[arm] = drafter.calibration(row_ids)
        return found

    def _limits(self, requests: RoundBatch, routes: Sequence[str]) -> list[int]:
        """Drafts of each request's own arm at most; what is said where texts are known late is no arm's."""
        return [
            min(self.drafters[arm].max_drafts, budget - 1)
            if arm in self.drafters and (self.host.exact or arm not in self.voices.speaking)
            else 0
            for arm, budget in zip(routes, requests.budgets, strict=True)
        ]

    def _askable(self, requests: RoundBatch, index: int) -> list[str]:
        """Arms that may draft for a request, if they have anything to propose; none for one that has ended."""
        # The last token a request may commit needs no draft: it is the bonus token.
        if requests.budgets[index] <= 1 or not self.controller.holds(*requests.names[index]):
            return []
        row, rid = requests.names[index]
        serving = self.quarantine.serving(self.drafters, rid)
        return [arm for arm in serving if self.controller.may_name(row, arm)]

    def _said(
        self, requests: RoundBatch, index: int, asked: Sequence[str], worth: Mapping[str, Worth]
    ) -> tuple[dict[str, Voice], dict[str, Forecast | None]]:
        """What those of `asked` say that may draft; and what each of these promises, None where it does not speak."""
        (row, rid), n = requests.names[index], requests.lengths.most[index]
        voices: dict[str, Voice] = {}
        promises: dict[str, Forecast | None] = {}
        for arm in asked:
            if arm in self.quarantine:
                continue  # since an earlier request of the batch was asked
            drafter, speaks, voice = self.voices.of_text.get(arm), arm in self.voices.speaking, None
            promised = None if drafter is None else drafter.promised(row)
            if promised is not None and self.controller.copies_anyway:
                if promised.length > 1:
                    promises[arm] = promised
                continue
            if drafter is not None and drafter.serves(row):
                history = partial(requests.history, index)
                say = partial(drafter.speak, row, n, history, worth[arm], self.under_way(row))
                voice = self.voices.heard(arm, rid, say)
            if voice and (voice.tokens or not speaks):
                voices[arm], promises[arm] = voice, voice.outlook(self.drafters[arm].max_drafts)
            elif not speaks and self.quarantine.serves(arm, rid):
                promises[arm] = None
        return voices, promises

    def _ask_too(
        self, requests: RoundBatch, asked: Sequence[Sequence[str]], worth: Mapping[str, Worth]
    ) -> None:
        """Where another rank decides: what drafters find while they are asked is what they draft later."""
        for index, names in enumerate(asked):
            self._said(requests, index, names, worth)

    def _route(
        self, requests: RoundBatch, asked: Sequence[Sequence[str]], worth: Mapping[str, Worth]
    ) -> tuple[list[str], list[dict[str, Voice]]]:
        """An arm for each request, and what is said of it; none for one that ended after the scheduler had put it into
        the batch.
        """
        running = [i for i, name in enumerate(requests.names) if self.controller.holds(*name)]
        rows, lengths = requests.row_ids, requests.lengths.most
        before = [self.controller.states[rows[i]].previous for i in running]
        routes = [arms.NONE] * len(rows)
        voices: list[dict[str, Voice]] = [{} for _ in rows]
        self.controller.costs.set_contexts(lengths)
        for i in running:
            state = self.controller.states[rows[i]]
            if state.tracker is not None:
                state.begin(partial(requests.answer, i))
        if running:
            forecasts = []
            for i in running:
                voices[i], promises = self._said(requests, i, asked[i], worth)
                forecasts.append(promises)
            found = self.controller.route([rows[i] for i in running], forecasts)
            for i, old, new in zip(running, before, found, strict=True):
                routes[i] = new
                # Before its last token a request has nothing to switch to.
                self.clock.switches += requests.budgets[i] > 1 and old not in (None, new)
        return routes, voices

    def _upload(
        self,
        requests: RoundBatch,
        members: Mapping[str, Sequence[int]],
        due: Mapping[str, Due],
        most: Sequence[Sequence[int]],
        decided: Decided,
        speakers: Sequence[str],
    ) -> OnDevice:
        if not due and not any(map(any, most)):
            nothing = requests.rows.new_empty(0)
            return OnDevice({}, nothing, nothing, nothing, nothing, nothing, {}, None)
        upload = Upload()
        most_at = [upload.ints(own) for own in most]
        members_at = {arm: upload.ints(indices) for arm, indices in members.items()}
        due_at = upload.ints(self.sync.flags(due, len(requests.row_ids)))
        calibration_at = {arm: upload.floats(own) for arm, own in decided.calibration.items()}
        any_voice, width = not self.host.exact and any(decided.voices), self.voices.width
        if any_voice:
            lines = [own.get(arm, SILENCE) for own in decided.voices for arm in speakers]
            tokens, counts, alive = laid(lines, width)
            host_at = [upload.ints(own) for own in (tokens.ravel(), counts, [line.at for line in lines])]
            alive_at = upload.floats(alive.ravel())
        ints, floats = upload.send(requests.rows.device)
        limits, joined, copying, rooms = (ints[at] for at in most_at)
        shape = len(decided.voices), len(speakers)
        return OnDevice(
            {arm: ints[at] for arm, at in members_at.items()},
            ints[due_at],
            limits,
            joined,
            copying,
            rooms,
            {arm: floats[at] for arm, at in calibration_at.items()},
            HostDrafts(
                ints[host_at[0]].view(*shape, width),
                floats[alive_at].view(*shape, width),
                *(ints[at].view(shape) for at in host_at[1:]),
            )
            if any_voice
            else None,
        )


def rows_of(drafters: Mapping[str, Drafter], arm: str) -> int:
    """Most rows that a request routed to `arm` verifies, of the arm's own drafts."""
    return drafters[arm].max_drafts + 1 if arm in drafters else 1


def drafts_nothing(routes: Sequence[str]) -> bool:
    """Whether every request decodes plainly."""
    return all(arm == arms.NONE for arm in routes)
