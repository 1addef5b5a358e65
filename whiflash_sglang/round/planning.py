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
from whiflash_sglang.drafters.base import Drafter, laid, of_text, widest_of
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.plan import Decided, OnDevice, Plan
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.voices import Voices
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.routing.request_state import RequestState
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
        states = [self.controller.state(*name) for name in requests.names]
        self.voices.spending.begin([rid for _, rid in requests.names])
        decided = self.ranks.broadcast(lambda: self._decide(requests, states))
        requests.take_single(decided.single)
        if not self.ranks.leads:  # what drafters find while they are asked is what they draft later
            for index, names in enumerate(decided.asked):
                self._said(requests, index, names, decided.worth)
        routes, widths = decided.routes, [1 + room for room in decided.rooms]
        members = {arm: [i for i, route in enumerate(routes) if route == arm] for arm in self.drafters}
        members = {arm: own for arm, own in members.items() if own}
        due = self.sync.due(requests.row_ids, requests.lengths, routes, widths)
        for state, width in zip(states, widths, strict=True):
            state.under_way.append(width)
        self.ranks.note(due)
        speakers = list(self.voices.speaking)
        return Plan(
            **vars(decided),
            states=states,
            decisions=[state.decision for state in states],
            members=members,
            due=due,
            speakers=[*speakers, *self.voices.on_device],
            on_device=self._upload(requests, members, due, decided, speakers),
        )

    def under_way(self, row: int) -> int:
        """Rows that are being verified for the request in `row`, at most."""
        state = self.controller.states.get(row)
        return 0 if state is None else sum(state.under_way)

    def _decide(self, requests: RoundBatch, states: Sequence[RequestState]) -> Decided:
        single = [i for i, (_, rid) in enumerate(requests.names) if self.voices.spending.is_dear(rid)]
        requests.take_single(single)
        asked = [self._askable(requests, i) for i in range(len(requests.row_ids))]
        worth = {arm: self.controller.worth(arm) for arm in self.drafters}
        routes, voices = self._route(requests, asked, worth)
        for i, state in enumerate(states):
            if self.host.exact and routes[i] == arms.NONE and not state.decision.promised:
                voices[i] = {}  # its rows would not pay
        voices = [self._heard(requests, i, own, worth) if own else own for i, own in enumerate(voices)]
        most = {arm: rows_of(self.drafters, arm) for arm in set(routes)}
        limits = [min(most[arm], budget) - 1 for arm, budget in zip(routes, requests.budgets, strict=True)]
        beside = [
            self._beside(requests, i, *own) for i, own in enumerate(zip(routes, limits, voices, strict=True))
        ]
        joined, copying, rooms = map(list, zip(*beside, strict=True))
        reckoned = [
            arms.PROMISED if arm == arms.NONE and state.decision.promised else arm
            for arm, state in zip(routes, states, strict=True)
        ]
        made = [self.controller.costs.room(own) for own in reckoned]
        judged = self._calibrations(requests.row_ids, routes)
        return Decided(
            single, routes, asked, limits, joined, copying, rooms, reckoned, made, voices, worth, judged
        )

    def _heard(
        self, requests: RoundBatch, index: int, voices: Mapping[str, Voice], worth: Mapping[str, Worth]
    ) -> dict[str, Voice]:
        """What may be verified of what is said of a request; where texts are known late, with what others know to
        follow it.
        """
        name = row, _ = requests.names[index]
        heard = {arm: voice for arm, voice in voices.items() if self.controller.hears(row, arm)}
        if self.host.exact:
            return heard
        if self.controller.may_join(row):
            room = widest_of(self.drafters) + self.under_way(row)
            heard = {
                arm: self.voices.extended(name, arm, voice, room, worth)[0] for arm, voice in heard.items()
            }
        return {arm: voice for arm, voice in heard.items() if not self.voices.found_on_device(arm, voice)}

    def _beside(
        self, requests: RoundBatch, index: int, route: str, limit: int, voices: Mapping[str, Voice]
    ) -> tuple[int, int, int]:
        """Drafts of a request at most if other arms may extend them, else 0; copies at most that the device may put in
        their place; and drafts at most, whoever's.
        """
        (row, rid), most, controller = requests.names[index], requests.budgets[index] - 1, self.controller
        if not controller.holds(row, rid):
            return 0, 0, 0
        longest = copying = 0
        joins = (limit or (self.host.exact and voices)) and controller.may_join(row)
        for arm in self.quarantine.serving(self.voices.of_text, rid):
            drafter = self.voices.of_text[arm]
            if not drafter.serves(row):
                continue
            if joins and arm in self.voices.speaking:
                longest = max(longest, drafter.max_drafts, limit)
            if arm in self.voices.on_device and controller.hears(row, arm):
                copying = min(drafter.max_drafts, most)
        room = max(limit, longest, copying)
        if voices:
            said = max(len(voice.tokens) for voice in voices.values())
            room = max(room, min(said, widest_of(self.drafters)))
        return min(longest, most), copying, min(room, most)

    def _calibrations(self, row_ids: Sequence[int], routes: Sequence[str]) -> dict[str, Floats]:
        """What drafts of the round are judged by, of every arm that may make some."""
        found = {}
        for arm, drafter in self.drafters.items():
            if (arm in routes or arm in self.voices.on_device) and arm not in self.quarantine:
                with self.quarantine.guard(arm):
                    found[arm] = drafter.calibration(row_ids)
        return found

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
            drafter, voice = self.voices.of_text.get(arm), None
            promised = None if drafter is None else drafter.promised(row)
            if promised is not None and self.controller.policy.joins_arms:
                if promised.length > 1:
                    promises[arm] = promised
                continue
            if drafter is not None and drafter.serves(row):
                history = partial(requests.history, index)
                say = partial(drafter.speak, row, n, history, worth[arm], self.under_way(row))
                voice = self.voices.heard(arm, rid, say)
            if voice and voice.tokens:
                voices[arm], promises[arm] = voice, voice.outlook(self.drafters[arm].max_drafts)
            elif arm not in self.voices.speaking and self.quarantine.serves(arm, rid):
                promises[arm] = None
        return voices, promises

    def _route(
        self, requests: RoundBatch, asked: Sequence[Sequence[str]], worth: Mapping[str, Worth]
    ) -> tuple[list[str], list[dict[str, Voice]]]:
        """A pass for each request, or none, and what is said of it; nothing of one that ended after the scheduler had
        put it into the batch.
        """
        running = [i for i, name in enumerate(requests.names) if self.controller.holds(*name)]
        rows, lengths = requests.row_ids, requests.lengths.most
        before = [self.controller.states[rows[i]].previous for i in running]
        routes = [arms.NONE] * len(rows)
        voices: list[dict[str, Voice]] = [{} for _ in rows]
        self.controller.costs.set_contexts(lengths)
        forecasts = []
        for i in running:
            state = self.controller.states[rows[i]]
            if state.tracker is not None:
                state.begin(partial(requests.answer, i))
            voices[i], promises = self._said(requests, i, asked[i], worth)
            forecasts.append(promises)
        found = self.controller.route([rows[i] for i in running], forecasts) if running else []
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
        decided: Decided,
        speakers: Sequence[str],
    ) -> OnDevice:
        if not due and not any(decided.rooms):
            nothing = requests.rows.new_empty(0)
            return OnDevice({}, nothing, nothing, nothing, nothing, nothing, {}, None)
        upload = Upload()
        most = decided.limits, decided.joined, decided.copying, decided.rooms
        most_at = [upload.ints(own) for own in most]
        members_at = {arm: upload.ints(indices) for arm, indices in members.items()}
        due_at = upload.ints(self.sync.flags(due, len(requests.row_ids)))
        calibration_at = {arm: upload.floats(own) for arm, own in decided.calibration.items()}
        any_voice, width = not self.host.exact and any(decided.voices), self.voices.width
        if any_voice:
            lines = [own.get(arm, SILENCE) for own in decided.voices for arm in speakers]
            ids, counts, chances = laid(lines, width)
            host_at = [upload.ints(own) for own in (ids.ravel(), counts, [line.at for line in lines])]
            alive_at = upload.floats(chances.ravel())
        ints, floats = upload.send(requests.rows.device)
        limits, joined, copying, rooms = (ints[at] for at in most_at)
        drafting = {arm: ints[at] for arm, at in members_at.items()}
        judged = {arm: floats[at] for arm, at in calibration_at.items()}
        said = None
        if any_voice:
            shape = len(decided.voices), len(speakers)
            tokens, alive = ints[host_at[0]].view(*shape, width), floats[alive_at].view(*shape, width)
            said = HostDrafts(tokens, alive, *(ints[at].view(shape) for at in host_at[1:]))
        return OnDevice(drafting, ints[due_at], limits, joined, copying, rooms, judged, said)


def rows_of(drafters: Mapping[str, Drafter], arm: str) -> int:
    """Most rows that a request reckoned under `arm` verifies, of the arm's own drafts."""
    if arm == arms.PROMISED:
        return widest_of(of_text(drafters)) + 1
    return drafters[arm].max_drafts + 1 if arm in drafters else 1
