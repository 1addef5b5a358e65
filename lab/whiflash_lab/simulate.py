"""Rounds of a card that nobody has here: published prices, published acceptance, and the server's own controller.

Nothing is measured. Prices are fits to published tables; `results/simulated.md` has their errors, also in tables that
no fit has seen. The controller, its policy and its looked-up prices are those of a server; drafts are drawn, not
computed. Every draft of a request is accepted with one chance, so a cut knows a draft's place and no confidence.
Imports no torch.
"""

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from math import ceil
from typing import NamedTuple

from whiflash_sglang.drafts import arms
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.prices.tables import CostTables, LookedUpCosts, Sizes, Verifications
from whiflash_sglang.records.request import Request as ServedRequest
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_train.rounds import agreed

METHODS = ("plain", "eagle3", "dflash", "cut", "auto")
WAITS = "auto, waiting"
"""`auto` before batches with a grammar overlapped: after each such round the next launch waited for the host."""
DRAFTS = {arms.AR: 4, arms.DIFFUSION: 15}
"""Drafts of a full round: an EAGLE-3 chain of four steps, a DFlash block of 16 rows."""

ACCEPTANCE = {
    "GSM8K": {arms.AR: 2.97, arms.DIFFUSION: 5.54},
    "MATH": {arms.AR: 5.40, arms.DIFFUSION: 4.97},
    "HumanEval": {arms.AR: 4.91, arms.DIFFUSION: 4.77},
    "LCB": {arms.AR: 4.47, arms.DIFFUSION: 4.46},
    "MT-Bench": {arms.AR: 3.86, arms.DIFFUSION: 3.16},
}
"""Tokens a round. EAGLE-3: Llama-3.1-8B, 7 steps (SpecForge). DFlash: Qwen3-8B, 15 drafts, T = 1 (AngelSlim)."""


class PublishedPair(NamedTuple):
    """Drafters by what was published of them.

    lengths: text → arm → tokens a round. published: arm → drafts of a round at that length. drafts: of a full round.
    """

    lengths: Mapping[str, Mapping[str, float]]
    published: Mapping[str, int]
    drafts: Mapping[str, int]


PAIR = PublishedPair(ACCEPTANCE, {arms.AR: 7, arms.DIFFUSION: 15}, DRAFTS)


def chance(length: float, drafts: int) -> float:
    """A draft's chance to be accepted after accepted ones, from the mean `length` of a round of `drafts` drafts."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if expected(middle, drafts) < length:
            low = middle
        else:
            high = middle
    return low


def expected(chance: float, drafts: int) -> float:
    """Tokens of a round, bonus token included."""
    return sum(chance**place for place in range(drafts + 1))


@dataclass(frozen=True, slots=True)
class Card:
    """Seconds. fixed: a forward of any size. row: one more row. token: one more token of context.

    chain: an EAGLE-3 step. block: a DFlash block, and the round's own work. experts: reading all of them. share: of
    them that one row uses; several rows use others, by chance.
    """

    name: str
    fixed: float
    row: float
    token: float
    chain: float
    block: float
    experts: float = 0.0
    share: float = 1.0

    def verify(self, rows: float, context: float) -> float:
        read: float = self.experts * (1 - (1 - self.share) ** rows)
        return self.fixed + self.row * rows + self.token * context + read

    def tables(self, rows: int, context: int, chain: int = DRAFTS[arms.AR]) -> CostTables:
        """Tables of a server's start on this card, for rows and a context up to these, and chains of this length."""
        sizes = grid(rows)
        drafts = {arms.AR: chain * self.chain, arms.DIFFUSION: self.block}
        by_arm = {arm: Sizes(tuple(sizes), (price,) * len(sizes)) for arm, price in drafts.items()}
        return CostTables(Verifications.measured(1, max(context, 2), sizes, self.verify), by_arm, {})


def grid(largest: int) -> list[int]:
    """Sizes of graphs: every size up to 8, then sixteenths of the power of two above, at least 4 apart."""
    sizes = list(range(1, 9))
    while sizes[-1] < largest:
        sizes.append(sizes[-1] + max(4, (1 << sizes[-1].bit_length()) // 16))
    return sizes


PARAMETERS = 8.2e9
"""Parameters of Qwen3-8B. A row takes two operations each: at a card's peak a row's published price within 12 %."""


def row_seconds(peak: float) -> float:
    """A row at `peak` operations a second."""
    return 2 * PARAMETERS / peak


CONTEXT = 768
"""Tokens of a request, to turn a published price of one more request into one of a token."""

H100 = Card("H100", 6.97e-3, row_seconds(989e12), 0.15e-3 / CONTEXT, 0.55e-3, 1.25e-3)
"""fixed: plain decoding in bf16 at 4 requests, 7.04 ms, less its rows. A request and a chain step: SGLang's FP8 rounds.
block: DFlash's throughput on an H20, less its verifications."""


class Host(NamedTuple):
    """Seconds that the host takes from a round's results to the next launch: a fixed part and one for each request."""

    fixed: float
    request: float

    def seconds(self, requests: int) -> float:
        return self.fixed + self.request * requests


HOST = Host(1.65e-3, 0.077e-3)
HOST_OF_GRAMMARS = Host(2.4e-3, 0.16e-3)
"""Fits to medians of 30 passes at 1, 8 and 32 requests on a CPU (`docs/dev/findings.md`, C15). Under grammars the
time begins with the drafts and holds the masks."""
PLANNING_OF_AGENTS = 0.25e-3
"""Seconds that `auto` plans and learns for a request beyond these, if it writes calls of twenty tools: 13.2 ms at 48
requests for 1.5 ms of copies alone (`tests/planning_time.py --agents`)."""


class SimulatedLoad(NamedTuple):
    """requests: at once; the next follows when one ends. total: requests, 0: four for each place, 100 at least.
    prompt, answer: tokens of each. grammars: the share of requests under a grammar. planning: the host's seconds for
    a request of `auto` beyond `HOST`.
    """

    requests: int
    total: int = 0
    prompt: int = 512
    answer: int = 512
    grammars: float = 0.0
    planning: float = 0.0


@dataclass(slots=True)
class Request:
    row: int
    constrained: bool
    chances: Mapping[str, float]
    left: int
    context: int


@dataclass(slots=True)
class Result:
    """Tokens a second, rounds, and how many rounds of requests each arm drafted for."""

    method: str
    requests: int
    tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    routed: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Simulation:
    """One card under one load, by one of `METHODS`."""

    def __init__(
        self, card: Card, load: SimulatedLoad, method: str, seed: int = 1, pair: PublishedPair = PAIR
    ) -> None:
        self.load, self.random, self.pair = load, random.Random(seed), pair
        self.method, self.waits = ("auto", True) if method == WAITS else (method, False)
        largest = load.requests * (max(pair.drafts.values()) + 1)
        context = load.requests * (load.prompt + load.answer)
        self.tables = card.tables(largest, context, pair.drafts.get(arms.AR, 0))
        self.card = card
        costs = LookedUpCosts(lambda arm: pair.drafts.get(arm, 0) + 1)
        costs.tables = self.tables
        self.controller = Controller(AutoPolicy(), costs, ())
        self.free = list(range(load.requests))
        self.opened = 0
        self.texts = cycle(pair.lengths.values())  # every method gets the same ones
        self.running: list[Request] = []
        self.result = Result(method, load.requests)

    def run(self) -> Result:
        waiting = self.load.total or max(4 * self.load.requests, 100)
        while waiting or self.running:
            begun = min(waiting, len(self.free))
            for _ in range(begun):
                self._open()
            if begun:
                self.result.seconds += self.card.verify(begun * self.load.prompt, 0)
            waiting -= begun
            self._round()
        return self.result

    def _open(self) -> None:
        lengths = next(self.texts)
        chances = {arm: chance(length, self.pair.published[arm]) for arm, length in lengths.items()}
        row = self.free.pop()
        # Evenly spread: one more request under a grammar whenever their share falls behind.
        constrained = int((self.opened + 1) * self.load.grammars) > int(self.opened * self.load.grammars)
        self.opened += 1
        self.running.append(Request(row, constrained, chances, self.load.answer, self.load.prompt))
        self.controller.open(ServedRequest(str(row), row=row), ())

    def _round(self) -> None:
        running, controller = self.running, self.controller
        controller.costs.set_contexts([request.context for request in running])
        routes = self._routes()
        drafts = self._cut(routes)
        drafted = {arm: routes.count(arm) for arm in set(routes) - {arms.NONE}}
        context = sum(request.context for request in running)
        padded, wanted = len(running) + sum(drafts), drafts
        if self.method == "auto":
            own = [controller.states[request.row].wanted[arm] for request, arm in zip(running, routes, strict=True)]
            room = map(controller.costs.room, routes, own)
            usual = (min(each, self.pair.drafts.get(arm, 0)) for arm, each in zip(routes, room, strict=True))
            padded = self._graph(len(running) + controller.costs.packed(len(running), ceil(sum(usual))))
            drafts = self._likeliest(routes, drafts, padded - len(running))
        verify = self.tables.verifications.at(padded, context)
        seconds = self._with_host(sum(self.tables.draft(arm, n) for arm, n in drafted.items()), verify)
        tokens = 0
        for request, arm, width, before in zip(list(running), routes, drafts, wanted, strict=True):
            chance = request.chances.get(arm, 0.0)
            accepted = agreed((self.random.random() < chance for _ in range(width)), [True] * width)
            emitted = min(accepted + 1, request.left)
            tokens += emitted
            request.left -= emitted
            request.context += emitted
            self.result.routed[arm] = self.result.routed.get(arm, 0) + 1
            if self.method == "auto":
                state = controller.states[request.row]
                controller.costs.wanted(arm, before, state.wanted[arm])
                controller.committed(state, state.decision, arm, [0] * emitted, width + 1)
            if not request.left:
                running.remove(request)
                controller.close(controller.states[request.row])
                self.free.append(request.row)
        if self.method == "auto":
            time = RoundTime(padded, len(routes), context, drafted, tokens=tokens, seconds=seconds)
            controller.costs.observe(time)
        self.result.tokens += tokens
        self.result.seconds += seconds
        self.result.rounds += 1

    def _with_host(self, draft: float, verify: float) -> float:
        """Seconds from launch to launch. The host works beside the card; grammars need the drafts first."""
        requests = len(self.running)
        if not self.load.grammars:
            return draft + verify
        planning = self.load.planning * requests if self.method == "auto" else 0.0
        if not any(request.constrained for request in self.running):
            return max(draft + verify, HOST.seconds(requests) + planning)
        host = HOST_OF_GRAMMARS.seconds(requests) + planning
        return draft + (verify + host if self.waits else max(verify, host))

    def _graph(self, rows: int) -> int:
        sizes = self.tables.verifications.at_short.sizes
        return sizes[min(bisect_left(sizes, rows), len(sizes) - 1)]

    def _likeliest(self, routes: Sequence[str], drafts: Sequence[int], most: int) -> list[int]:
        """Drafts of each request if there are rows for `most`, as `choose_drafts` leaves out the least likely."""
        chances = [request.chances.get(arm, 0.0) for request, arm in zip(self.running, routes, strict=True)]
        alive = [
            (-(chances[i] ** (place + 1)), i) for i, longest in enumerate(drafts) for place in range(longest)
        ]
        kept = Counter(i for _, i in sorted(alive)[:most])
        return [kept[i] for i in range(len(drafts))]

    def _routes(self) -> list[str]:
        if self.method == "auto":
            forecasts = [dict.fromkeys(self.pair.drafts) for _ in self.running]
            requests = [self.controller.states[request.row] for request in self.running]
            return self.controller.route(requests, forecasts)
        arm = {"plain": arms.NONE, "eagle3": arms.AR}.get(self.method, arms.DIFFUSION)
        return [arm] * len(self.running)

    def _cut(self, routes: Sequence[str]) -> list[int]:
        """Drafts that each request verifies."""
        full = [self.pair.drafts.get(arm, 0) for arm in routes]
        if self.method not in ("cut", "auto"):
            return full
        chances = [request.chances.get(arm, 0.0) for request, arm in zip(self.running, routes, strict=True)]
        if self.method == "auto":
            worths = [self.controller.worth(arm).row for arm in routes]
            return [
                sum(chance ** (place + 1) >= worth for place in range(longest))
                for chance, longest, worth in zip(chances, full, worths, strict=True)
            ]
        context = sum(request.context for request in self.running)
        return cut(
            chances, full[0], lambda rows: self.tables.verifications.at(rows, context) + self.card.block
        )


def cut(chances: Sequence[float], longest: int, price: Callable[[float], float]) -> list[int]:
    """Drafts of each request such that the batch has most expected tokens a second: the likeliest drafts first."""
    likeliest = sorted(
        ((chance ** (k + 1), i) for i, chance in enumerate(chances) for k in range(longest)), reverse=True
    )
    total, best, keep = float(len(chances)), len(chances) / price(len(chances)), 0
    for kept, (alive, _) in enumerate(likeliest, 1):
        total += alive
        rate = total / price(len(chances) + kept)
        if rate > best:
            best, keep = rate, kept
    drafts = [0] * len(chances)
    for _, index in likeliest[:keep]:
        drafts[index] += 1
    return drafts


def table(card: Card, sizes: Sequence[int], load: SimulatedLoad) -> list[Result]:
    """A result for every size and method, the sizes in order. load: its `requests` are the sizes'."""
    methods = (*METHODS, WAITS) if load.grammars else METHODS
    return [Simulation(card, load._replace(requests=n), method).run() for n in sizes for method in methods]


def assumed(card: Card, load: SimulatedLoad) -> str:
    """One line: what a table rests on."""
    return (
        f"SIMULATED, nothing measured: Qwen3-8B bf16 on an {card.name}, closed load, prompts of {load.prompt}, "
        f"answers of {load.answer} tokens. "
        "Prices: fits to published tables. Acceptance: published means, EAGLE-3's of Llama-3.1-8B, one chance a draft. "
        + (
            f"No lookup. Grammars in {load.grammars:.0%} of requests, the host's times of a CPU here."
            if load.grammars
            else "No lookup, no host time."
        )
    )
