"""Simulates rounds on a GPU from published prices and acceptance lengths, with the server's own controller.

Nothing is measured. Prices are fits to published tables; `results/simulated.md` has their errors, also on tables that
were not fitted. The controller, its policy and its looked-up prices are those of a server. Whether a draft of a
position is right is drawn once, so all methods meet the same text. Drafts are cut by their place, without confidences.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil
from operator import mul
from typing import NamedTuple

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from whiflash_lab.cards import DRAFTS, KNOWN, Card, FittedCard
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.drafts.rates import continuing
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.request import Request as ServedRequest
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy

METHODS = ("plain", "eagle3", "dflash", "auto")
FIXED = {"plain": arms.NONE, "eagle3": arms.AR, "dflash": arms.DIFFUSION}
"""Methods that use one arm at its full length in every round; "eagle3 2" is a chain of two drafts."""
ACCEPTANCE = {
    "GSM8K": {arms.AR: 2.97, arms.DIFFUSION: 5.54},
    "MATH": {arms.AR: 5.40, arms.DIFFUSION: 4.97},
    "HumanEval": {arms.AR: 4.91, arms.DIFFUSION: 4.77},
    "LCB": {arms.AR: 4.47, arms.DIFFUSION: 4.46},
    "MT-Bench": {arms.AR: 3.86, arms.DIFFUSION: 3.16},
}
"""Published tokens per round. EAGLE-3: Llama-3.1-8B, 7 steps (SpecForge). DFlash: Qwen3-8B, 15 drafts, T = 1
(AngelSlim)."""


class PublishedPair(NamedTuple):
    """A target's drafters, described by published figures.

    lengths: text → arm → tokens per round. published: arm → drafts of a round at that length. drafts: arm → drafts of a
    full round in the simulation.
    """

    lengths: Mapping[str, Mapping[str, float]]
    published: Mapping[str, int]
    drafts: Mapping[str, int]

    def chances(self, text: str) -> dict[str, float]:
        """Return by arm the chance that a draft for a text of this kind is right."""
        return {arm: continuing(mean, self.published[arm] + 1) for arm, mean in self.lengths[text].items()}


PAIR = PublishedPair(ACCEPTANCE, {arms.AR: 7, arms.DIFFUSION: 15}, DRAFTS)


class Host(NamedTuple):
    """Seconds that the host takes from a round's results to the next launch: a fixed part and one for each request."""

    fixed: float
    request: float


FREE = Host(0.0, 0.0)
HOST = Host(1.65e-3, 0.077e-3)
HOST_OF_GRAMMARS = Host(2.4e-3, 0.16e-3)
"""Fits to medians of 30 passes at 1, 8 and 32 requests on a CPU (`docs/dev/findings.md`, C15). Under grammars the
time begins with the drafts and holds the masks."""
PLANNING_OF_AGENTS = 0.25e-3
"""Seconds per request that `auto` adds to these for planning and learning, if the request writes calls of twenty tools:
13.2 ms at 48 requests, against 1.5 ms with copies only (`tests/planning_time.py --agents`)."""


TURN = (*(0,) * 10, 16, 0, 4, 12, 1, 10, *(0,) * 6, 16, 2)
"""Numbers of known tokens before each unknown one in an agent's turn, counted by that command after a hundred rounds:
prose, half of which is in a tenant's earlier text, then a call. Without a drafter a round has 3.5 tokens."""
PROSE = 10
BEHIND = 64
"""Most features that wait for a drafter: with so many it catches up beside another drafter's round."""


class SimulatedLoad(NamedTuple):
    """A closed load. requests: at once; the next one follows when one ends. total: number of requests; 0: four times
    `requests`, at least 100. prompt, answer: tokens of each. tools: share of requests that write prose and calls in
    turn, under a grammar; above 0 the host's time counts. cached: cached tokens before each prompt, which are not
    prefilled."""

    requests: int
    total: int = 0
    prompt: int = 512
    answer: int = 512
    tools: float = 0.0
    cached: int = 0


@dataclass(slots=True, kw_only=True)
class Request:
    """A simulated request. right: arm → number of right drafts in a row from each position; `STRUCTURE`: of drafts that
    the host knows to be right. chances: arm → chance that a draft is right, by position. at: the next position. behind:
    tokens that each arm must catch up with.
    """

    row: int
    agent: bool
    chances: Mapping[str, Sequence[float]]
    right: Mapping[str, Sequence[int]]
    prompt: int
    at: int = 0
    behind: Counter[str] = field(default_factory=Counter)

    @property
    def known(self) -> Forecast:
        """Forecast of the drafts that the host knows to be right."""
        drafts = min(self.right[arms.STRUCTURE][self.at], KNOWN)
        return Forecast(1.0 + drafts, 1 + drafts)

    def alive(self, arm: str, worth: float, most: int) -> list[float]:
        """Return the chances that successive drafts of `arm` are accepted: the first, and those of at least `worth`."""
        alive = accumulate([self.chances[arm][self.at]] * most, mul) if most else ()
        return [each for place, each in enumerate(alive) if each >= worth or not place]

    def accepted(self, arm: str, drafts: int) -> int:
        """Return the number of tokens that a round with `drafts` drafts of `arm` commits."""
        right = self.right[arm][self.at] if drafts else 0
        return min(right, drafts, len(self.right[arms.STRUCTURE]) - self.at - 1) + 1


@dataclass(slots=True)
class Result:
    """Totals of a simulation: tokens, seconds, rounds, and the number of requests' rounds by arm (`routed`)."""

    method: str
    requests: int
    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    routed: Counter[str] = field(default_factory=Counter)
    prefills: float = 0.0
    probe_seconds: float = 0.0
    probe_tokens: int = 0

    @property
    def probes(self) -> float:
        """Share of tokens lost by probes: rounds with probes' share of the seconds minus their share of the tokens."""
        return self.probe_seconds / (self.seconds - self.prefills) - self.probe_tokens / self.tokens

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Simulation:
    """Simulates one card under one load with one of `METHODS`."""

    def __init__(
        self,
        card: Card | FittedCard,
        load: SimulatedLoad,
        method: str,
        seed: int = 1,
        pair: PublishedPair = PAIR,
        host: Host = FREE,
        measured: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Prepare the requests, and the controller with the card's prices.

        host: its seconds per round; `FREE`: chosen by the load. measured: prior chances for `AutoPolicy`.
        """
        self.card, self.load, self.method = card, load, method
        self.seed, self.pair, self.host = seed, pair, host
        largest = load.requests * (max(*pair.drafts.values(), KNOWN) + 1)
        context = load.requests * (load.cached + load.prompt + load.answer)
        self.tables = card.tables(largest, context, pair.drafts.get(arms.AR, 0))
        costs = Costs(lambda arm: pair.drafts.get(arm, 0) + 1)
        costs.tables = self.tables
        self.controller = Controller(AutoPolicy(measured=measured), costs, ())
        self.texts = [pair.chances(text) for text in pair.lengths]
        self.free = list(range(load.requests))
        self.opened = 0
        self.running: list[Request] = []
        self.least_rows, self.probing = 0, False
        self.lengths: dict[str, int] = {}
        self.result = Result(method, load.requests)
        self.trace: list[tuple[int, float]] = []
        """Tokens and seconds of each round."""

    def run(self, rounds: int = 1 << 62) -> Result:
        """Run until no new request follows an ended one, or for `rounds` rounds. The first requests begin mid-answer,
        so that the load is steady."""
        waiting = self.load.total or max(4 * self.load.requests, 100)
        while (waiting or not self.free) and len(self.trace) < rounds:
            begun = min(waiting, len(self.free))
            for _ in range(begun):
                self._open()
            if begun:
                self.result.prefills += (prefill := self.card.prefill(begun * self.load.prompt))
                self.result.seconds += prefill
            waiting -= begun
            self._round()
        return self.result

    def rate(self, first: int, last: int | None = None) -> float:
        """Return the tokens per second of the rounds [first, last)."""
        tokens, seconds = map(sum, zip(*self.trace[first:last], strict=True))
        return tokens / seconds

    def _open(self) -> None:
        number, answer = self.opened, self.load.answer
        self.opened += 1
        # Evenly spread: one more agent whenever their share falls behind.
        agent = int(self.opened * self.load.tools) > int(number * self.load.tools)
        if agent:
            turn = [known for run in TURN for known in (*(True,) * run, False)]
            known = np.resize(turn, answer)
            kinds = np.resize([0] * PROSE + [1] * (len(turn) - PROSE), answer)
            texts = sorted(self.texts, key=lambda text: sum(text.values()))[:: max(len(self.texts) - 1, 1)]
        else:
            known, kinds, texts = np.zeros(answer, dtype=bool), np.full(answer, number), self.texts
        luck = default_rng((self.seed, number)).random(answer)  # drafters find the same tokens hard
        chances = {arm: np.array([one[arm] for one in texts])[kinds % len(texts)] for arm in self.pair.drafts}
        right = {arm: luck < each for arm, each in chances.items()} | {arms.STRUCTURE: known}
        row, places = self.free.pop(), self.load.requests
        self.running.append(
            Request(
                row=row,
                agent=agent,
                chances={arm: each.tolist() for arm, each in chances.items()},
                right={arm: _runs(each) for arm, each in right.items()},
                prompt=self.load.cached + self.load.prompt,
                at=answer * number // places if number < places else 0,
            )
        )
        self.controller.open(ServedRequest(str(row), row=row), ())

    def _round(self) -> None:
        running, costs = list(self.running), self.controller.costs
        costs.set_contexts([request.prompt + request.at for request in running])
        if self.method == "auto":
            rounds = self._routed(running)
        else:
            name, _, length = self.method.partition(" ")
            arm = FIXED[name]
            self.lengths[arm] = int(length or self.pair.drafts.get(arm, 0))
            rounds = [(arm, arm, self.lengths[arm])] * len(running)
        drafted = Counter(route for route, *_ in rounds if route != arms.NONE)
        widths = [1 + drafts for *_, drafts in rounds]
        rows = max(sum(widths), self.least_rows)
        contexts = [request.prompt + request.at for request in running]
        caught_up, draft = {}, 0.0
        for arm, n in drafted.items():
            behind = [max(one.behind[arm], 1) for one, (route, *_) in zip(running, rounds, strict=True) if route == arm]
            caught_up[arm] = sum(behind)
            draft += self.card.drafting(self.tables, arm, n, self.lengths.get(arm, 0), caught_up[arm])
        verify = self.card.forward(self.tables, rows, widths, contexts)
        gap = self._waits(running, draft, verify)
        tokens = 0
        for request, (route, arm, drafts) in zip(running, rounds, strict=True):
            emitted = request.accepted(arm, drafts)
            tokens += emitted
            if self.method == "auto":
                state = self.controller.states[request.row]
                drafters, done = {arm, route} - {arms.NONE}, [0] * emitted
                lengths = {each: request.accepted(each, drafts) for each in drafters} or {arm: emitted}
                self.controller.committed(state, state.decision, arm, done, drafts + 1, lengths=lengths)
            for each in self.pair.drafts:
                request.behind[each] = 0 if each == route else min(request.behind[each] + emitted, BEHIND)
            request.at += emitted
            if request.at == self.load.answer:
                self.running.remove(request)
                self.controller.close(self.controller.states[request.row])
                self.free.append(request.row)
        self.result.routed.update(arm for _, arm, _ in rounds)
        spent = draft + verify
        ended = RoundTime(rows, len(running), sum(contexts), drafted, caught_up, tokens=tokens)
        ended.seconds, ended.gap = spent, gap
        costs.observe(ended)
        self.trace.append((tokens, spent + gap))
        self.result.tokens += tokens
        self.result.seconds += spent + gap
        if self.probing:
            self.result.probe_tokens += tokens
            self.result.probe_seconds += spent + gap
        self.result.rounds += 1

    def _waits(self, running: Sequence[Request], draft: float, verify: float) -> float:
        """Return the seconds of a round in which the card waits for the host. The host works during the verification,
        and during the draft pass unless a request has a grammar."""
        agents = sum(request.agent for request in running)
        usual = HOST_OF_GRAMMARS if agents else HOST if self.load.tools else FREE
        host = usual if self.host is FREE else self.host
        planning = PLANNING_OF_AGENTS * agents if self.method == "auto" else 0.0
        seconds = host.fixed + host.request * len(running)
        return max(seconds + planning - verify - (0.0 if agents else draft), 0.0)

    def _routed(self, running: Sequence[Request]) -> list[tuple[str, str, int]]:
        """Route by `auto`: return each request's draft pass, the arm whose drafts are verified, and their number."""
        states = [self.controller.states[request.row] for request in running]
        forecasts = [
            dict.fromkeys(self.pair.drafts) | ({arms.STRUCTURE: request.known} if request.known.rows > 1 else {})
            for request in running
        ]
        routes, costs = self.controller.route(states, forecasts), self.controller.costs
        self.probing = any(state.decision.keeps is None for state in states)
        rounds, room, alive = [], 0.0, []
        self.lengths = {arm: costs.length(arm) if arm != arms.NONE else 0 for arm in routes}
        for index, (request, state, route) in enumerate(zip(running, states, routes, strict=True)):
            longest, arm = self.lengths[route], route
            chances = request.alive(route, 0.0, longest)  # those that are not worth a row fill rows that are left
            paying = len(request.alive(route, self.controller.worth().row, longest))
            known = [1.0] * (request.known.rows - 1)
            if sum(known) > sum(chances[:paying]) and state.decision.only != arms.NONE:
                arm, chances, paying = arms.STRUCTURE, known, len(known)
            priced_as = arms.PROMISED if route == arms.NONE and state.decision.promised else route
            room += min(costs.room(priced_as, state.wanted[priced_as]), longest or KNOWN)
            self.controller.wanted(state, state.decision, priced_as, paying)
            rounds.append((route, arm))
            alive += [(each, index) for each in chances]
        sizes = self.tables.verifications.at_short.sizes
        packed = costs.packed(len(running), ceil(room), len(alive))
        self.least_rows = sizes[bisect_left(sizes, len(running) + packed)]
        most = self.least_rows - len(running)
        kept = Counter(index for _, index in sorted(alive, reverse=True)[:most])
        return [(*each, kept[index]) for index, each in enumerate(rounds)]


def _runs(right: NDArray[np.bool_]) -> list[int]:
    """Return for each position the number of true values in a row from there on."""
    places = np.arange(len(right))
    runs: list[int] = (np.minimum.accumulate(np.where(right, len(right), places)[::-1])[::-1] - places).tolist()
    return runs


def table(card: Card, sizes: Sequence[int], load: SimulatedLoad) -> list[Result]:
    """Simulate every number of requests in `sizes` with every method. load: its `requests` are replaced."""
    return [Simulation(card, load._replace(requests=n), method).run() for n in sizes for method in METHODS]


def assumed(card: Card, load: SimulatedLoad) -> str:
    """Return the line that precedes the simulated rates: model, card, load, origin of prices and acceptance."""
    agents = f"{load.tools:.0%} of requests write calls under grammars, with the host's times of a CPU."
    return (
        f"SIMULATED, nothing measured: Qwen3-8B bf16 on an {card.name}, closed load, prompts of {load.prompt}, "
        f"answers of {load.answer} tokens. Prices: fits to published tables. Acceptance: published means, EAGLE-3's of "
        f"Llama-3.1-8B, one chance a draft. {agents if load.tools else 'No lookup, no host time.'}"
    )
