"""`whiflash advise`: estimates the fastest server for a target, GPUs and a load, from published figures or from a
running server's prices.

Only a running server's figures are measured. `published.yaml` has the estimate's errors on one H100 and one H20. Prices
of other cards, of several cards and of experts follow from a card's bandwidth. Imports no torch.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from whiflash_sdk.render.aligned import count

from whiflash_lab.cards import H100, PARAMETERS, Card
from whiflash_lab.published import FACTS, KNOWN, Gpu, PublishedTarget, Shape, known
from whiflash_lab.simulate import FIXED, METHODS, PublishedPair, SimulatedLoad, Simulation
from whiflash_sglang.cli.report import brought
from whiflash_sglang.cli.top import unknown
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.files.progress import tracked

FULL = {arms.AR: 5, arms.DIFFUSION: 7}
"""Drafts of a full round, if published rounds have as many: the longest chain of a start, a block of eight rows."""
USABLE = 0.88
"""Share of a card's memory that SGLang takes for weights and KV."""
WORTH_IT = 1.03
"""Smallest speed-up over the next simpler way for which a way is worth its memory."""
PLAIN, OURS, OWN = "plain", "WHIFLASH", "its own traffic"
TASK = "simulating loads"

GPUS = FACTS.cards
_QWEN = Shape(PARAMETERS, PARAMETERS, 36, 147456)
LAYER = (H100.fixed - 2 * PARAMETERS / GPUS["h100"].bandwidth) / _QWEN.layers
"""Seconds of a layer besides reading its weights: the rest of Qwen3-8B's published step on an H100."""
EXPERTS_LAYER = 90e-6
"""Seconds of a layer of experts besides reading it, fitted to gpt-oss-120b's published 212 tokens/s on one H100."""
EAGER = 0.5e-3
"""Assumed seconds that a drafter's layer takes longer outside a CUDA graph, which several cards per server need."""
REDUCE, SURE = 20e-6, 1.25
"""Assumed seconds of a layer's two reductions between cards; factor by which one server on all cards must therefore be
faster than replicas."""
READ, WIDER = 1.8, 0.1
"""Seconds to read a token of context, over its bytes divided by the card's bandwidth, and the same for each further
row, up to eight, on an H200 (`results/gpu/verification.json`). Published steps of an H100 and an H20 fit, too."""
ENOUGH, MOST_DRAFTS = 64, 256
"""Least rounds that show a drafter's acceptance; most drafts of a round that are plausible."""
BLOCK_LAYERS = 5
"""Layers of a published block drafter; an EAGLE-3 drafter has one."""
DRAFTER = 1.7
"""Memory of a drafter's layer over a target's, both with embeddings: six layers take 4.7 GB beside Qwen3-8B."""
PAYS = "nothing, its KV stayed", "a copy of its KV from host memory", "a prefill, at the card's peak"
"""Costs of an agent that returns with its context, if the KV of all agents does not fit."""
HOST_TIER = 1
"""The cost in `PAYS` that estimates assume: its flags are among the settings."""
NGRAM = PublishedPair({"ours": {arms.DIFFUSION: 1.2}}, {arms.DIFFUSION: 11}, {arms.DIFFUSION: 11})
"""SGLang's NGRAM as a block whose drafting is free, with the length in `results/README.md`, measured once."""


class Question(NamedTuple):
    """A question to `advise`. requests: numbers of requests at once. tools: share of requests under a grammar. prompt,
    answer: tokens. context: cached tokens before each prompt.
    """

    target: str
    gpu: str = "h100"
    cards: int = 1
    requests: tuple[int, ...] = (1, 8, 32)
    temperature: float = 0.0
    tools: float = 0.0
    prompt: int = 512
    answer: int = 256
    context: int = 0


class Returning(NamedTuple):
    """Estimated rates if an agent returns before every answer. pays: how its KV comes back, an entry of `PAYS`.
    seconds: time that this takes a server with `OURS`. rates: as in `Estimate`.
    """

    pays: str
    seconds: float
    rates: Mapping[str, float]


class Server(NamedTuple):
    """One of `replicas` equal servers. prices: requests at once → prices. fitting: layers of drafters → number of
    requests whose KV fits. returns: layers of drafters → seconds to bring a returning agent's KV back, for each of
    `PAYS`. eager: seconds that each layer of our drafters takes longer outside a graph.
    """

    prices: Callable[[int], Card]
    fitting: Callable[[int], int] = lambda layers: sys.maxsize
    returns: Callable[[int], Sequence[float]] = lambda layers: [0.0] * len(PAYS)
    replicas: int = 1
    eager: float = 0.0


class Estimate(NamedTuple):
    """Estimated rates of one load. rates: way to serve → tokens per second; a way is an algorithm of SGLang, `PLAIN` or
    `OURS`. spread: flag with which one server uses several cards. low, high: `OURS` over plain decoding, on the worst
    and the best text. ahead: `OURS` over `stock`, lowest and highest. returning: one for each of `PAYS`; empty if all
    KV fits."""

    load: str
    spread: str
    rates: Mapping[str, float]
    low: float
    high: float
    ahead: tuple[float, float] = (1.0, 1.0)
    replicas: int = 1
    returning: Sequence[Returning] = ()

    @property
    def gain(self) -> str:
        """Rate of `OURS` over that of plain decoding, as text with its range over texts."""
        return f"{self.rates[OURS] / self.rates[PLAIN]:.2f}{_by_set(self.low, self.high)}"

    @property
    def stock(self) -> str:
        """Name of the fastest way to serve without this package."""
        return max((way for way in self.rates if way != OURS), key=self.rates.__getitem__)

    @property
    def choice(self) -> str:
        """Name of the fastest way to serve, or of a simpler one that is less than 3 % slower."""
        chosen = PLAIN
        for other in (self.stock, OURS):
            if self.rates[other] >= WORTH_IT * self.rates[chosen]:
                chosen = other
        return chosen

    def verdict(self, error: float) -> str:
        """Return a sentence on the choice and its gains over the others. error: relative error of an estimated gain."""
        rate = self.rates[self.choice]
        ways = [way for way in dict.fromkeys((OURS, self.stock, PLAIN)) if way != self.choice]
        low, high = self.ahead if self.choice == OURS else (1 / self.ahead[1], 1 / self.ahead[0])
        brackets = {way: _by_set(low, high) for way in ways if {self.choice, way} == {OURS, self.stock}}
        over = [
            f"{rate / self.rates[way]:.2f}{brackets.get(way, '')} of {way}'s {self.rates[way]:,.0f}" for way in ways
        ]
        unsure = self.choice != PLAIN and rate < (1 + error) * self.rates[PLAIN]
        parts = f"{self.choice} for {self.load}: {rate:,.0f} tokens a second, {' and '.join(over)}"
        return parts + (", which is within the error" if unsure else "")


def _by_set(low: float, high: float) -> str:
    return f" [{low:.2f}, {high:.2f}]" if low < high else ""


@dataclass
class Advice:
    """An answer of `advise`. assumed: the assumptions, in a line. published: figures that others measured. copies:
    gains of copied drafts, which `rows` leave out. obstacles: facts that stop a launch or make an estimate pointless.
    """

    assumed: str
    verdict: str
    rows: list[Estimate]
    published: list[str]
    eagle3: Sequence[str]
    block: Sequence[str]
    settings: list[str]
    copies: Sequence[str] = FACTS.copies
    lost: Sequence[str] = FACTS.lost
    obstacles: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        rows = [{**row._asdict(), "choice": row.choice} for row in self.rows]
        for row in rows:
            row["returning"] = [each._asdict() for each in row["returning"]]
        return {**vars(self), "rows": rows}


def advise(question: Question, state: Mapping[str, Any] | None = None) -> Advice:
    """Answer a question. state: state of a server that runs the target, whose prices and acceptance are used then.

    Raises:
        ConfigError: no such card, nothing is known of the target, the server has drafted too little, or the question
            has a context beside `state`.
    """
    target = known(question.target)
    if state is not None:
        beside = {"--context": question.context, "--count": question.cards > 1}
        if refused := [option for option, given in beside.items() if given]:
            raise UsageError(f"remove {' and '.join(refused)}: with --url, prices are the server's own")
        card, pair, source = _of_server(state, question)
        target = target or PublishedTarget(question.target, _QWEN, (), ())
        loads = question.requests if pair.drafts else ()
        sums = brought(state)  # the gain includes copies and forced text
        if (gain := sums["gain"]) is None:
            raise ConfigError(f"what the server brings over plain decoding is {unknown(sums['plain_price'])}")
        rates = {PLAIN: sums["plain_tokens_per_second"], OURS: sums["tokens_per_second"]}
        rows = [Estimate(OWN, "", rates, gain, gain)]
        own = Server(lambda _: card)
        rows += [_row(own, pair, question, n, _block(target)) for n in tracked(loads, TASK)]
        verdict, prices = rows[0].verdict(0.0), "the running server, host's time included; drafters alone"
    else:
        if target is None:
            raise UsageError(
                f"{question.target}: nothing is known of it; name one of {', '.join(entry.name for entry in KNOWN)}, "
                "or give --url of a server that runs it"
            )
        gpu, (lengths, published, source) = _gpu(question.gpu), target.acceptance
        pair = PublishedPair(lengths, published, {arm: min(FULL[arm], n) for arm, n in published.items()})
        rows = [_fastest(target, gpu, pair, question, n) for n in tracked(question.requests, TASK)]
        verdict = "; ".join(row.verdict(max(_off(target))) for row in rows)
        verdict += _cautions(target, question, rows, pair) + _without_host(rows[-1])
        prices = _prices(target, gpu, question)
    return Advice(
        assumed=_assumed(target, question, prices, source, pair),
        verdict=f"Take {verdict}.",
        rows=rows,
        published=[entry.shown for entry in target.ratios],
        eagle3=target.eagle3,
        block=target.block,
        settings=list(_settings(target, question, rows[-1], (state or {}).get("by_arm", {}))),
        obstacles=[] if state else list(_obstacles(target.shape, question, rows[-1].replicas)),
    )


def _cautions(target: PublishedTarget, question: Question, rows: Sequence[Estimate], pair: PublishedPair) -> str:
    """Return reasons against `OURS` if it is the fastest, else an empty text."""
    ours = {n: row for n, row in zip(question.requests, rows, strict=True) if row.choice == OURS}
    if not ours:
        return ""
    most, row = ours.popitem()
    close = row.rates[OURS] < (1 + max(_off(target))) * row.rates[row.stock]
    lead = ", and its lead is within the estimates' error" if close else ""
    caution = f". No card has served trained weights with {OURS}{lead}: measure it beside {row.stock} first"
    if question.tools:
        free = _fastest(target, _gpu(question.gpu), pair, question._replace(tools=0.0), most)
        caution = f"; without grammars {free.choice} for {free.load}{caution}"
    return caution


def _without_host(row: Estimate) -> str:
    """Return a sentence with the rate if evicted contexts are prefilled again, not copied; empty if all KV fits."""
    if not row.returning:
        return ""
    again = row.returning[-1].rates
    return (
        f". KV does not fit {row.load}: without the host memory below, agents prefill again, and {row.choice} has "
        f"{again[row.choice]:,.0f} tokens a second, {again[row.choice] / again[PLAIN]:.2f} of plain's"
    )


def _assumed(target: PublishedTarget, question: Question, prices: str, source: str, pair: PublishedPair) -> str:
    chains = f"EAGLE3 drafts chains of {pair.drafts[arms.AR]}, " if arms.AR in pair.drafts else ""
    names = {arms.AR: "EAGLE3", arms.DIFFUSION: _block(target)}
    rounds = " and ".join(
        f"{fmean(one[arm] for one in pair.lengths.values()):.2f} of {names[arm]}" for arm in pair.drafts
    )
    behind = (
        f" after {question.context:,} cached ones, which every way reads as our kernel does on an H200 (SGLang's "
        "Triton kernel takes up to 33 times as long, FA3 was not measured: gains over plain may be less)"
    )
    tools = (
        f"; {question.tools:.0%} of requests write calls of twenty tools under grammars, of which the host knows "
        "what it was measured to"
    )
    load = f"tokens{behind if question.context else ''}{tools if question.tools else ''}"
    if question.context + question.prompt + question.answer > target.shape.positions:
        load += f"; beyond {target.shape.positions:,} positions SGLang needs YaRN, and drafters accept less"
    return (
        f"ESTIMATE, nothing measured here. {target.name}, prices of {prices}. Acceptance: {source}, "
        f"{rounds or 'no'} tokens a round in the mean; yours may differ, and a temperature of "
        f"{question.temperature:g} changes no row. Prompts of {question.prompt}, answers of {question.answer} "
        f"{load}. {chains}NGRAM has 1.20 tokens a round, as once measured here. "
        "A way is taken if it is 3 % faster than a simpler one."
    )


def _off(target: PublishedTarget) -> list[float]:
    """Return the relative errors of our estimates of published speed-ups over plain decoding: this target's, or all
    targets' if it has none."""

    def of(one: PublishedTarget) -> list[float]:
        tried = [ratio for ratio in one.ratios if ratio.using and ratio.using[1] != arms.NONE]
        return [found / float(ratio.by_requests[n]) - 1 for ratio in tried for n, found in ratio.estimated.items()]

    return of(target) or [off for one in KNOWN for off in of(one)]


def _prices(target: PublishedTarget, gpu: Gpu, question: Question) -> str:
    off, shown = _off(target), gpu in (GPUS["h100"], GPUS["h20"])
    error = f"on one card ratios were {min(off):+.0%} to {max(off):+.0%} off where others measured them"
    cards = f"{question.cards} × {gpu.name} bf16, fits to published tables scaled by bandwidth"
    if question.cards > 1:
        cards += f", with --tp-size {1000 * EAGER:g} ms a layer of WHIFLASH's drafters, which no graph holds (assumed)"
    return f"{cards}; {error if shown else 'no table shows their error'}"


def _obstacles(shape: Shape, question: Question, replicas: int) -> Iterator[str]:
    weights, gpu, most = sum(_split(shape)), _gpu(question.gpu), max(question.requests)
    if (room := USABLE * gpu.memory * question.cards - weights) < 0:
        yield (
            f"{weights / 1e9:.0f} GB of weights do not fit {question.cards} × {gpu.name} of "
            f"{gpu.memory / 1e9:.0f} GB with KV beside them"
        )
    tokens, cards = question.context + question.prompt + question.answer, question.cards // replicas
    layers = 0, BLOCK_LAYERS, BLOCK_LAYERS + 1
    plain, one, two = (replicas * _fitting(shape, question, cards, each) for each in layers)
    if most > two and room > 0:
        on, needed = f" on {replicas} replicas" if replicas > 1 else "", most * tokens * shape.kv / 1e9
        yield (
            f"KV for {most} × {tokens:,} tokens takes {needed:.0f} GB: {plain} requests fit{on}, {one} beside a block "
            f"drafter, {two} beside two. Rows assume that the others wait"
            f"{', in host memory' * bool(question.context)}; more fit if they share a prefix"
        )


def _fitting(shape: Shape, question: Question, cards: int, layers: int = BLOCK_LAYERS + 1) -> int:
    """Return the number of requests whose KV fits beside drafters of `layers` layers, whole copies on each card."""
    always, experts = _split(shape)
    drafters = layers * cards / shape.layers
    room = USABLE * _gpu(question.gpu).memory * cards - experts - always * (1 + DRAFTER * drafters)
    each = _slot(shape, cards, layers) * (question.context + question.prompt + question.answer)
    return max(int(room / each), 0)


def _slot(shape: Shape, cards: int, layers: int = BLOCK_LAYERS + 1) -> float:
    """Return the bytes of a token's KV on all cards together, with that of drafters of `layers` layers."""
    return shape.kv * (1 + layers * cards / shape.layers)


def _returns(shape: Shape, question: Question, cards: int, layers: int = BLOCK_LAYERS + 1) -> list[float]:
    """Return the seconds that a server needs to bring back one returning agent's KV, for each of `PAYS`."""
    gpu, tokens = _gpu(question.gpu), question.context
    copied = tokens * _slot(shape, cards, layers) / (gpu.host * cards)
    operations = 2 * shape.active + 2 * shape.layers * shape.width * tokens  # half of the context is seen in the mean
    return [0.0, copied, tokens * operations / (gpu.flops * cards)]


def _gpu(name: str) -> Gpu:
    if name.lower() not in GPUS:
        raise UsageError(f"--gpu {name} is not one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def _split(shape: Shape) -> tuple[float, float]:
    """Return the bytes of weights that every token reads, and the bytes of all experts."""
    if not shape.experts:
        return 2 * shape.parameters, 0.0
    experts = (shape.parameters - shape.active) / (1 - shape.used / shape.experts)
    return 2 * (shape.parameters - experts), shape.expert_bytes * experts


def _card(shape: Shape, gpu: Gpu, cards: int, context: int = 0, requests: int = 1) -> Card:
    """Return the prices of a target on `cards` cards. context: cached tokens per request, which drafters read, too."""
    always, experts = _split(shape)
    layer = (EXPERTS_LAYER if shape.experts else LAYER) + (REDUCE if cards > 1 else 0.0)
    token = shape.kv / (gpu.bandwidth * cards)
    cached = token * context * requests / shape.layers
    return Card(
        gpu.name,
        fixed=always / (gpu.bandwidth * cards) + shape.layers * layer,
        row=2 * shape.active / (gpu.flops * cards),
        token=(READ - WIDER) * token,
        deep=WIDER * token / requests,
        chain=H100.chain + READ * cached,
        block=H100.block + BLOCK_LAYERS * (READ + FULL[arms.DIFFUSION] * WIDER) * cached,
        experts=experts / (gpu.bandwidth * cards),
        share=shape.used / shape.experts if shape.experts else 1.0,
    )


def _of_server(state: Mapping[str, Any], question: Question) -> tuple[Card, PublishedPair, str]:
    """Return the prices and acceptance that a server has measured. Raises ConfigError if it has drafted too little."""
    costs, by_arm = state.get("costs") or {}, state.get("by_arm") or {}
    drafted = {
        arm: (sums["tokens"] / sums["rounds"], max(1, round(sums["proposed"] / sums["rounds"])))
        for arm, sums in by_arm.items()
        if arm in FULL and sums["rounds"] >= ENOUGH
    }
    rounds = [sums["rounds"] for arm, sums in by_arm.items() if arm != arms.NONE]
    if any(sums["tokens"] > sums["rounds"] + sums["proposed"] for sums in by_arm.values()) or any(
        drafts > MOST_DRAFTS for _, drafts in drafted.values()
    ):
        raise ConfigError(
            f"the server counts more than {MOST_DRAFTS} drafts a round, or more tokens than drafts: is it WHIFLASH's?"
        )
    if max(rounds, default=0) < ENOUGH or not costs.get("verify"):
        raise ConfigError(
            f"the server has drafted in fewer than {ENOUGH} rounds of a drafter: send it requests, then ask again"
        )
    row = max(costs.get("verify_row", 0.0), 1e-9)
    draft = costs.get("draft") or {}
    drafts = {arm: longest for arm, (_, longest) in drafted.items()}
    card = Card(
        "server",
        fixed=max(costs["verify"] + costs.get("between", 0.0) - row, 1e-6),
        row=row,
        token=0.0,  # the server does not say what context costs
        chain=draft.get(arms.AR, 0.0) / drafts.get(arms.AR, 1),
        block=draft.get(arms.DIFFUSION, 0.0),
    )
    lengths = {"its traffic": {arm: length for arm, (length, _) in drafted.items()}}
    few = [arm for arm in FULL if arm not in drafted and arm in (*by_arm, *state.get("arms", ()))]
    without = f", without {' and '.join(few)}: fewer than {ENOUGH} rounds" if few else ""
    return card, PublishedPair(lengths, drafts, drafts), f"of its traffic since the start{without}"


def _block(target: PublishedTarget) -> str:
    """Return the name of SGLang's algorithm for the target's first block drafter."""
    return "DSPARK" if "dspark" in "".join(target.block[:1]).lower() else "DFLASH"


def _fastest(target: PublishedTarget, gpu: Gpu, pair: PublishedPair, question: Question, requests: int) -> Estimate:
    """Estimate one server per card if the target fits on one, or one server on all cards if that is surely faster."""
    whole = question.cards

    def on(cards: int, replicas: int) -> Estimate:
        prices = partial(_card, target.shape, gpu, cards, question.context)
        sizes = target.shape, question, cards
        eager = EAGER if cards > 1 else 0.0
        server = Server(prices, partial(_fitting, *sizes), partial(_returns, *sizes), replicas, eager)
        row = _row(server, pair, question, requests, _block(target))
        name, size = ("dp", replicas) if replicas > 1 else ("tp", cards)
        return row._replace(
            load=count(requests, "request") + (f", {name} {size}" if whole > 1 else ""),
            spread=f"--{name}-size {size}" if whole > 1 else "",
            replicas=replicas,
        )

    replicas = [on(1, whole)] if whole > 1 and _fitting(target.shape, question, 1) else []
    return max([*replicas, on(whole, 1)], key=lambda row: max(row.rates.values()) * (SURE if row in replicas else 1))


def _row(server: Server, pair: PublishedPair, question: Question, requests: int, block: str) -> Estimate:
    """Estimate the tokens per second of each way to serve a load. block: SGLang's algorithm for block drafters."""
    tools = max(question.tools, 1e-9)  # above 0, so that the host's time counts
    layers = {"EAGLE3": 1, block: BLOCK_LAYERS, OURS: BLOCK_LAYERS + 1}
    each = -(-requests // server.replicas)

    def rate(way: str, pair: PublishedPair) -> float:
        at_once = max(min(each, server.fitting(layers.get(way, 0))), 1)
        load = SimulatedLoad(
            at_once, 4 * at_once + 40, question.prompt, question.answer, tools=tools, cached=question.context
        )
        card, method = server.prices(at_once), methods.get(way)
        if way == OURS:
            eager = server.eager
            card = replace(card, chain=card.chain + eager, block=card.block + BLOCK_LAYERS * eager)
        if method is None:  # NGRAM's drafting is free
            card, method = replace(card, block=0.0), "dflash"
        rate = Simulation(card, load, method, pair=pair).run().rate
        return rate * min(server.replicas, requests / at_once)

    def paying(way: str, rate: float, pays: int = HOST_TIER) -> float:
        beside = layers.get(way, 0)
        seconds = server.returns(beside)[pays] if server.fitting(beside) < each else 0.0
        return rate / (1 + rate / server.replicas * seconds / question.answer)

    ways = {"eagle3": "EAGLE3", "dflash": block, "auto": OURS}
    drafted = (method for method in METHODS if FIXED.get(method, arms.NONE) in (arms.NONE, *pair.drafts))
    methods = {ways.get(method, method): method for method in drafted}
    free = {way: rate(way, pair) for way in methods}
    free |= {"NGRAM": rate("NGRAM", NGRAM), OURS: free.pop(OURS)}
    rates = {way: paying(way, rate) for way, rate in free.items()}
    every = Estimate(count(requests, "request"), "", rates, 1.0, 1.0)
    single = [pair._replace(lengths={name: lengths}) for name, lengths in pair.lengths.items()]
    plain, best = rates[PLAIN], rates[every.stock]
    # The mean over texts is included, so that it is within its bracket.
    ours = [rates[OURS], *(paying(OURS, rate(OURS, one)) for one in single)]
    stock = every.stock
    theirs = [best, *(paying(stock, rate(stock, one)) if stock in methods else best for one in single)]
    ahead = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    returning = [
        Returning(pays, seconds, {way: paying(way, rate, at) for way, rate in free.items()})
        for at, (pays, seconds) in enumerate(zip(PAYS, server.returns(layers[OURS]), strict=True))
        if question.context and server.fitting(layers[OURS]) < each
    ]
    return every._replace(
        low=min(ours) / plain, high=max(ours) / plain, ahead=(min(ahead), max(ahead)), returning=returning
    )


def _settings(target: PublishedTarget, question: Question, row: Estimate, by_arm: Mapping[str, Any]) -> Iterator[str]:
    """Yield commands that serve and measure the choice, with advice. row: the last load's. by_arm: a server's state."""
    if FULL.keys() & by_arm.keys():
        yield "The server has drafters. `whiflash policy none --url URL` stops them while it serves, `auto` goes on."
        return
    spread = f" {row.spread}" if row.spread else ""
    parsers = f" {target.parsers}" if target.parsers else ""
    if question.context and row.replicas > 1:
        spread = ""
        yield "One server on each card, behind SGLang's router (cache_aware): it keeps prefixes, and drops cache_salt."
    if row.returning:
        cards = question.cards // row.replicas
        agents = -(-max(question.requests) // row.replicas)
        tokens = question.context + question.prompt + question.answer
        host = -int(-agents * tokens * _slot(target.shape, cards) // (1e9 * cards))
        parsers += f" --enable-session-radix-cache --enable-hierarchical-cache --hicache-size {host}"
        narrow = target.shape._replace(kv=target.shape.kv // 2)
        plain, ours = (row.replicas * _fitting(narrow, question, cards, n) for n in (0, BLOCK_LAYERS + 1))
        yield (
            f"Host memory: {host} GB a card hold all agents' KV. Requests carry session_id (the SDK's Session sends "
            "it), so that agents' KV outlives other requests'; --radix-eviction-policy priority orders among them."
        )
        yield (
            f"--kv-cache-dtype fp8_e4m3: {plain} agents fit, {ours} beside two drafters. Its text differs from that of "
            "16-bit KV."
        )
    if not by_arm and row.choice != OURS:
        drafter = {"EAGLE3": target.eagle3, _block(target): target.block}.get(row.choice, ())[:1]
        flags = "" if row.choice == PLAIN else f" --speculative-algorithm {row.choice}"
        flags += "".join(f" --speculative-draft-model-path {name}" for name in drafter)
        yield f"sglang serve {target.name}{flags}{spread}{parsers}"
    drafters = (("--eagle3", target.eagle3), ("--dflash", target.block))
    parts = [f"{flag} {names[0]}" for flag, names in drafters if names]
    if not parts:
        yield "Train drafters: `whiflash train`; until then `whiflash serve` copies and drafts forced text."
        return
    yield f"whiflash bundle create --target {target.name} {' '.join(parts)} --out my-bundle"
    bound = f" --max-running-requests {max(question.requests)}" if max(question.requests) > 48 else ""
    yield f"whiflash serve {target.name} --speculative-draft-model-path my-bundle{spread}{parsers}{bound}"
    stock = ",".join(way for way in row.rates if way not in (PLAIN, OURS))
    most = max(_fitting(target.shape, question, question.cards // row.replicas), 1)
    loads = ",".join(dict.fromkeys(str(min(-(-load // row.replicas), most)) for load in question.requests))
    arguments = f"--no-interleave --arms none,{stock},auto --concurrency {loads}"
    arguments += f' --server-args="{row.spread}"' if row.spread.startswith("--tp") else ""
    yield f"whiflash bench --model-path {target.name} --bundle my-bundle {arguments}"
