"""`whiflash advise`: estimates the fastest server for a target, GPUs and a load, from published figures.

`published.yaml` has the estimate's errors on one H100 and one H20. Prices of other cards, of several cards and of
experts follow from a card's bandwidth. Imports no torch.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from whiflash_sdk.render.aligned import count

from whiflash_lab.cards import H100, PARAMETERS, Card
from whiflash_lab.published import FACTS, KNOWN, Acceptance, Gpu, PublishedTarget, Shape, known, of_directory
from whiflash_lab.simulate import FIXED, METHODS, PublishedPair, SimulatedLoad, Simulation
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import UsageError
from whiflash_sglang.files.progress import tracked

FULL = {arms.AR: 5, arms.DIFFUSION: 7}
"""Drafts of a full round, if published rounds have as many: the longest chain of a start, a block of eight rows."""
USABLE = 0.88
"""Share of a card's memory that SGLang takes for weights and KV."""
PLAIN, OURS = "plain", "WHIFLASH"

GPUS = FACTS.cards
LAYER = (H100.fixed - 2 * PARAMETERS / GPUS["h100"].bandwidth) / 36
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
BLOCK_LAYERS = 5
"""Layers of a published block drafter; an EAGLE-3 drafter has one."""
DRAFTER = 1.7
"""Memory of a drafter's layer over a target's, both with embeddings: six layers take 4.7 GB beside Qwen3-8B."""
PAYS = "nothing, its KV stayed", "a copy of its KV from host memory", "a prefill, at the GPU's peak"
"""Costs of an agent that returns with its context, if the KV of all agents does not fit."""
HOST_TIER = 1
"""The cost in `PAYS` that estimates assume: its flags are among the settings."""
NGRAM = PublishedPair({"ours": {arms.DIFFUSION: 1.2}}, {arms.DIFFUSION: 11}, {arms.DIFFUSION: 11})
"""SGLang's NGRAM as a block whose drafting is free, with the length in `results/README.md`, measured once."""


class Question(NamedTuple):
    """A question to `advise`. requests: numbers of requests at once. tools: share of requests under a grammar. prompt,
    answer: tokens. context: cached tokens before each prompt. acceptance: tokens a round of each drafter, None for
    published ones.
    """

    target: str
    gpu: str = "h100"
    cards: int = 1
    requests: tuple[int, ...] = (1, 8, 32)
    tools: float = 0.0
    prompt: int = 512
    answer: int = 256
    context: int = 0
    acceptance: float | None = None


class Returning(NamedTuple):
    """Estimated rates if an agent returns before every answer. pays: how its KV comes back, an entry of `PAYS`.
    seconds: time that this takes a server with `OURS`. rates: as in `Estimate`.
    """

    pays: str
    seconds: float
    rates: Mapping[str, float]


class Estimate(NamedTuple):
    """Estimated rates of one load. rates: way to serve → tokens per second; a way is an algorithm of SGLang, `PLAIN` or
    `OURS`. spread: flag with which one server uses several cards. low, high: `OURS` over plain decoding, on the worst
    and the best text. returning: one for each of `PAYS`; empty if all KV fits."""

    load: str
    spread: str
    rates: Mapping[str, float]
    low: float
    high: float
    replicas: int = 1
    returning: Sequence[Returning] = ()

    @property
    def stock(self) -> str:
        """Name of the fastest way to serve without this package."""
        return max((way for way in self.rates if way != OURS), key=self.rates.__getitem__)

    @property
    def over_plain(self) -> str:
        """Text with the rate of `OURS` over plain decoding, and its range over texts."""
        by_text = f" ({self.low:.2f} to {self.high:.2f})" if self.low < self.high else ""
        return f"{self.rates[OURS] / self.rates[PLAIN]:.2f}{by_text}"

    def level(self, error: float) -> list[str]:
        """Return the ways that may be the fastest, fastest first. error: relative error of rates over plain decoding's;
        between drafters it is `BETWEEN`."""
        ways = sorted(self.rates, key=self.rates.__getitem__, reverse=True)
        best = self.rates[ways[0]]
        return [way for way in ways if best <= self.rates[way] * (1 + (error if PLAIN in (way, ways[0]) else BETWEEN))]

    def choice(self, error: float) -> str:
        """Return a way that may be the fastest: plain decoding if it is one, else SGLang's fastest, else ours."""
        level = self.level(error)
        return next((way for way in (PLAIN, self.stock) if way in level), level[0])

    def verdict(self, error: float) -> str:
        """Return a sentence that names the way to take, or the ways to measure if several may be the fastest."""
        level, choice = self.level(error), self.choice(error)
        shown = [f"{way} {self.rates[way]:,.0f}" for way in level]
        if len(level) > 1:
            simple = "no drafter" if choice == PLAIN else "no plugin"
            until = f". Until then take {choice}, which needs {simple}" if choice != OURS else ""
            shown += [] if PLAIN in level else [f"plain only {self.rates[PLAIN]:,.0f}"]
            return f"level, so measure: {', '.join(shown)} tokens a second{until}."
        others = [way for way in dict.fromkeys((OURS, self.stock, PLAIN)) if way != choice]
        over = [f"{self.rates[choice] / self.rates[way]:.2f} times {way}'s {self.rates[way]:,.0f}" for way in others]
        return f"take {choice}: {self.rates[choice]:,.0f} tokens a second, {' and '.join(over)}."


@dataclass
class Advice:
    """An answer of `advise`. verdict: a line for each load. choices: `Estimate.choice` of each
    row. assumed: an assumption a line. published: figures that others measured. copies: gains of copies,
    which the rows lack. lost: costs of WHIFLASH. obstacles: facts on what does not fit.
    """

    verdict: str
    assumed: str
    choices: list[str]
    rows: list[Estimate]
    published: list[str]
    eagle3: Sequence[str]
    block: Sequence[str]
    settings: list[str]
    lost: Sequence[str]
    copies: Sequence[str] = FACTS.copies
    obstacles: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        rows = [{**row._asdict(), "choice": choice} for row, choice in zip(self.rows, self.choices, strict=True)]
        for row in rows:
            row["returning"] = [each._asdict() for each in row["returning"]]
        return {**vars(self), "rows": rows}


def advise(question: Question) -> Advice:
    """Estimate every way to serve the question's target on its cards, for each load.

    Raises:
        UsageError: no such card, or nothing is known of the target.
    """
    target = _answerable(known(question.target) or of_directory(Path(os.path.expanduser(question.target))), question)
    gpu, (lengths, published, source) = _gpu(question.gpu), target.acceptance
    sizes = sizes_of(target.shape)
    fitting = [size for size in sizes if sum(_split(target.shape)) < USABLE * gpu.memory * size]
    if not fitting or fitting[0] > question.cards:
        return _too_large(target, question, fitting)
    if not _fitting(target.shape, question, 1, layers_of(target)):
        question = question._replace(cards=max(size for size in sizes if size <= question.cards))
    pair = PublishedPair(lengths, published, {arm: min(FULL[arm], n) for arm, n in published.items()})
    rows = [_fastest(target, gpu, pair, question, n) for n in tracked(question.requests, "simulating loads")]
    error = max(_off(target))
    verdict = "\n".join(f"Estimate for {row.load}: {row.verdict(error)}" for row in rows)
    choices = [row.choice(error) for row in rows]
    return Advice(
        verdict=verdict + _cautions(target, question, rows, pair) + _without_host(rows[-1], error),
        assumed=_assumed(target, question, _prices(target, gpu, question, rows), source, pair),
        choices=choices,
        rows=rows,
        published=[entry.shown for entry in target.ratios],
        eagle3=target.eagle3,
        block=target.block,
        settings=list(_settings(target, question, rows[-1], choices[-1])),
        lost=[_memory(target, question, rows[-1].replicas), *FACTS.lost],
        obstacles=list(_obstacles(target, question, rows[-1].replicas)),
    )


def sizes_of(shape: Shape) -> list[int]:
    """Return the numbers of cards on which one server can divide the target's attention heads."""
    return [size for size in (1 << power for power in range(13)) if shape.heads % size == 0]


def cards_for(target: PublishedTarget, gpu: str) -> int:
    """Return the fewest cards that hold the target, its drafters and a request of 32,768 tokens."""
    asked, layers = Question(target.name, gpu, prompt=32768 - Question("").answer), layers_of(target)
    return next(size for size in sizes_of(target.shape) if _fitting(target.shape, asked, size, layers))


def layers_of(target: PublishedTarget) -> int:
    """Return the number of layers of the target's drafters; of one drafter of each kind if none is known."""
    return bool(target.eagle3) + BLOCK_LAYERS * bool(target.block) or 1 + BLOCK_LAYERS


def _drafters(target: PublishedTarget) -> str:
    return "one drafter" if bool(target.eagle3) != bool(target.block) else "two drafters"


def _too_large(target: PublishedTarget, question: Question, fitting: Sequence[int]) -> Advice:
    """Return the answer for a target whose weights do not fit. fitting: numbers of cards that they fit."""
    gpu = _gpu(question.gpu)
    verdict = (
        f"{target.name} does not fit {question.cards} × {gpu.name} of {gpu.memory / 1e9:.0f} GB: its weights take "
        f"{sum(_split(target.shape)) / 1e9:.0f} GB in {target.shape.weights}. "
        + (f"It takes {fitting[0]} × {gpu.name}: --count {fitting[0]}." if fitting else "Take GPUs with more memory.")
    )
    return Advice(verdict, "", [], [], [], (), (), [], (), ())


def _answerable(target: PublishedTarget | None, question: Question) -> PublishedTarget:
    """Return the target with an acceptance: the one in the question, its own, or Qwen3-8B's. UsageError if unknown."""
    if target is None:
        names = {entry.name.lower().rpartition("/")[2]: entry.name for entry in KNOWN}
        last = question.target.lower().rstrip("/").rpartition("/")[2]
        near = [name for name in names if last in name] or get_close_matches(last, names, 2)
        meant = f"did you mean {' or '.join(names[name] for name in near)}?"
        guess = f"; {meant if near else 'known are ' + ', '.join(names.values()) + '.'}"
        raise UsageError(f"{question.target}: nothing is known of it{guess} Or name a directory with its config.json")
    has = {arms.AR: target.eagle3, arms.DIFFUSION: target.block}
    drafting = [arm for arm in FULL if has[arm] or not any(has.values())]
    if question.acceptance is not None:
        given = {"all": dict.fromkeys(FULL, question.acceptance)}
        lengths, drafts, source = Acceptance(given, FULL, "ASSUMED, as --acceptance says")
    elif target.acceptance.lengths:
        return target
    else:
        lengths, drafts, _ = next(entry.acceptance for entry in KNOWN if entry.name == "Qwen/Qwen3-8B")
        source = "ASSUMED, none of its drafters' is known, so Qwen3-8B's (--acceptance sets another)"
    kept = {text: {arm: one[arm] for arm in drafting} for text, one in lengths.items()}
    return target._replace(acceptance=Acceptance(kept, {arm: drafts[arm] for arm in drafting}, source))


def _cautions(target: PublishedTarget, question: Question, rows: Sequence[Estimate], pair: PublishedPair) -> str:
    """Return warnings, a line each: drafters without a row; if `OURS` may be the fastest, that it is untried there."""
    error = max(_off(target))
    unknown_ways = [way for way in _ways(target) if way not in rows[-1].rates]
    caution = "".join(f"\n{way} has no row, since no acceptance is published: measure it, too." for way in unknown_ways)
    ours = {n: row for n, row in zip(question.requests, rows, strict=True) if OURS in row.level(error)}
    if not ours:
        return caution
    caution += f"\nNo GPU has served trained weights with {OURS} yet."
    most, row = ours.popitem()
    if question.tools and row.choice(error) == OURS:
        free = _fastest(target, _gpu(question.gpu), pair, question._replace(tools=0.0), most)
        caution = f"\nWithout grammars, for {free.load}: {free.verdict(error)}{caution}"
    return caution


def _without_host(row: Estimate, error: float) -> str:
    """Return a sentence on tokens a second if evicted contexts are prefilled again; empty if nothing is evicted."""
    if not row.returning:
        return ""
    again, choice = row.returning[-1].rates, row.choice(error)
    return (
        f"\nKV does not fit {row.load}: without the host memory below, agents prefill again, and {choice} has "
        f"{again[choice]:,.0f} tokens a second, {again[choice] / again[PLAIN]:.2f} times plain's."
    )


def _memory(target: PublishedTarget, question: Question, replicas: int) -> str:
    """Return a sentence: how many fewer tokens fit beside the drafters, and the seconds to prefill a prefix again."""
    shape, gpu, cards = target.shape, _gpu(question.gpu), question.cards // replicas
    layers, one, prefix = layers_of(target), question._replace(context=0, prompt=1, answer=0), 32768
    plain, ours = (_fitting(shape, one, cards, each) for each in (0, layers))
    fewer = f"hold {100 * (1 - ours / plain):.0f} % fewer tokens" if plain else "hold no token"
    seconds = _returns(shape, question._replace(context=prefix), cards, layers)[-1]
    return (
        f"Memory: with {_drafters(target)} {cards} × {gpu.name} {fewer} of {target.name} (draft KV, and "
        f"{_draft_weights(shape, layers) / 1e9:.1f} GB a GPU), and a prefix of {prefix:,} that falls out takes "
        f"{seconds:.1f} seconds to prefill (computed at the GPU's peak); `whiflash check --draft` names a drafter's."
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
        f"; {question.tools:.0%} of requests write calls of twenty tools under grammars, which force the share of "
        "their tokens that was once measured"
    )
    load = f"tokens{behind if question.context else ''}{tools if question.tools else ''}"
    if question.context + question.prompt + question.answer > target.shape.positions:
        load += f"; beyond {target.shape.positions:,} positions SGLang needs YaRN, and drafters accept less"
    return (
        f"Nothing was measured here. {target.name}, prices of {prices}.\nAcceptance: {source}, "
        f"{rounds or 'no'} tokens a round in the mean; yours may differ.\nPrompts of {question.prompt}, answers of "
        f"{question.answer} {load}.\n{chains}NGRAM has 1.20 tokens a round, as once measured here.\nServers are level "
        f"if an error as large as those of earlier estimates could turn their order: {100 * BETWEEN:.0f} % between two "
        "drafters."
    )


def _off(target: PublishedTarget) -> list[float]:
    """Return the relative errors of our estimates of published speed-ups over plain decoding: this target's, or all
    targets' if it has none."""

    def of(one: PublishedTarget) -> list[float]:
        tried = [ratio for ratio in one.ratios if ratio.using and ratio.using[1] != arms.NONE]
        return [found / float(ratio.by_requests[n]) - 1 for ratio in tried for n, found in ratio.estimated.items()]

    return of(target) or [off for one in KNOWN for off in of(one)]


def _between() -> Iterator[float]:
    """Yield the relative errors of estimated ratios between two drafters that others measured on the same card."""
    for one in KNOWN:
        tried = [ratio for ratio in one.ratios if ratio.using and ratio.using[1] != arms.NONE]
        for a, b in permutations(tried, 2):
            if a.using and b.using and a.using[0] == b.using[0]:
                for n in a.estimated.keys() & b.estimated.keys():
                    published = float(a.by_requests[n]) / float(b.by_requests[n])
                    yield a.estimated[n] / b.estimated[n] / published - 1


BETWEEN = max(map(abs, _between()))
"""Largest relative error of an estimated ratio between two drafters."""


def _prices(target: PublishedTarget, gpu: Gpu, question: Question, rows: Sequence[Estimate]) -> str:
    off, shown = _off(target), gpu in (GPUS["h100"], GPUS["h20"])
    error = f"on one GPU ratios were {min(off):+.0%} to {max(off):+.0%} off where others measured them"
    cards = f"{question.cards} × {gpu.name} {target.shape.weights}, fits to published tables scaled by bandwidth"
    if any(row.spread.startswith("--tp") for row in rows):
        cards += f", with --tp-size {1000 * EAGER:g} ms a layer of WHIFLASH's drafters, which no graph holds (assumed)"
    return f"{cards}; {error if shown else 'no table shows their error'}"


def _obstacles(target: PublishedTarget, question: Question, replicas: int) -> Iterator[str]:
    most, cards, shape = max(question.requests), question.cards // replicas, target.shape
    tokens = question.context + question.prompt + question.answer
    plain, ours = (replicas * _fitting(shape, question, cards, each) for each in (0, layers_of(target)))
    if most > ours:
        on, needed = f" on {replicas} replicas" if replicas > 1 else "", most * tokens * _slot(shape, cards, 0) / 1e9
        yield (
            f"KV for {most} × {tokens:,} tokens takes {needed:.0f} GB: {plain} requests fit{on}, {ours} beside "
            f"{_drafters(target)}. Rows assume that the others wait"
            f"{', in host memory' * bool(question.context)}; more fit if they share a prefix"
        )


def _fitting(shape: Shape, question: Question, cards: int, layers: int) -> int:
    """Return the number of requests whose KV fits beside drafters of `layers` layers, whole copies on each card."""
    room = (USABLE * _gpu(question.gpu).memory - _draft_weights(shape, layers)) * cards - sum(_split(shape))
    each = _slot(shape, cards, layers) * (question.context + question.prompt + question.answer)
    return max(int(room / each), 0)


def _slot(shape: Shape, cards: int, layers: int) -> float:
    """Return the bytes of a token's KV on all cards together, with drafters of `layers` layers, whole on each card."""
    # A card holds at least one of the target's KV heads. If cards are more than heads, several hold the same one.
    return shape.kv * max(1, cards / shape.kv_heads) + layers * cards * shape.draft_kv


def _draft_weights(shape: Shape, layers: int) -> float:
    """Return the bytes of drafters of `layers` layers on one card. They have 16 bits beside a quantised target, too."""
    return DRAFTER * layers / shape.layers * 2 * _split(shape)[0] / shape.weight_bytes


def _returns(shape: Shape, question: Question, cards: int, layers: int) -> list[float]:
    """Return the seconds that a server needs to bring back one returning agent's KV, for each of `PAYS`."""
    gpu, tokens = _gpu(question.gpu), question.context
    copied = tokens * _slot(shape, cards, layers) / (gpu.host * cards)
    operations = 2 * shape.active + 2 * shape.layers * shape.width * tokens  # half of the context is seen in the mean
    return [0.0, copied, tokens * operations / (gpu.flops * cards)]


def _gpu(name: str) -> Gpu:
    """Return the card of this name, which may be as `nvidia-smi` prints it. Raises UsageError."""
    words = set(re.split("[^a-z0-9]+", name.lower()))
    fitting = [key for key in GPUS if words.issuperset(key.split("-"))]
    if not fitting:
        raise UsageError(f"--gpu: '{name}' is not one of {', '.join(GPUS)}")
    return GPUS[max(fitting, key=len)]


def _split(shape: Shape) -> tuple[float, float]:
    """Return the bytes of weights that every token reads, and the bytes of all experts."""
    if not shape.experts:
        return shape.weight_bytes * shape.parameters, 0.0
    experts = (shape.parameters - shape.active) / (1 - shape.used / shape.experts)
    return shape.weight_bytes * (shape.parameters - experts), shape.expert_bytes * experts


def _card(shape: Shape, gpu: Gpu, cards: int, context: int = 0, requests: int = 1, copies: int = 1) -> Card:
    """Return the prices of a target on `cards` cards. context: cached tokens per request, which drafters read, too.
    copies: cards that hold whole drafters, in no CUDA graph if they are several. A draft pass takes the H100's time and
    what this card needs more to read the weights of Qwen3-8B's drafters: a block is 14 % below an H200's record.
    """
    always, experts = _split(shape)
    layer = (EXPERTS_LAYER if shape.experts else LAYER) + (REDUCE if cards > 1 else 0.0)
    token = _slot(shape, cards, 0) / (gpu.bandwidth * cards)
    cached = shape.draft_kv * copies * context * requests / (gpu.bandwidth * cards)
    later = DRAFTER * 2 * PARAMETERS / 36 * (1 / gpu.bandwidth - 1 / GPUS["h100"].bandwidth) + EAGER * (copies > 1)
    return Card(
        gpu.name,
        fixed=always / (gpu.bandwidth * cards) + shape.layers * layer,
        row=2 * shape.active / (gpu.flops * cards),
        token=(READ - WIDER) * token,
        deep=WIDER * token / requests,
        chain=H100.chain + later + READ * cached,
        block=H100.block + BLOCK_LAYERS * (later + (READ + FULL[arms.DIFFUSION] * WIDER) * cached),
        experts=experts / (gpu.bandwidth * cards),
        share=shape.used / shape.experts if shape.experts else 1.0,
    )


def _block(target: PublishedTarget) -> str:
    """Return the name of SGLang's algorithm for the target's first block drafter."""
    return "DSPARK" if "dspark" in "".join(target.block[:1]).lower() else "DFLASH"


def _ways(target: PublishedTarget) -> dict[str, Sequence[str]]:
    """Return the target's published drafters by SGLang's algorithm."""
    return {way: names for way, names in (("EAGLE3", target.eagle3), (_block(target), target.block)) if names}


def _fastest(target: PublishedTarget, gpu: Gpu, pair: PublishedPair, question: Question, requests: int) -> Estimate:
    """Estimate one server per card if the target fits on one, or one server on all cards if that is surely faster and
    they divide the target's heads."""
    on, whole = partial(_row, target, gpu, pair, question, requests), question.cards
    replicas = [on(1, whole)] if whole > 1 and _fitting(target.shape, question, 1, layers_of(target)) else []
    together = [on(whole, 1)] if whole in sizes_of(target.shape) else []
    return max([*replicas, *together], key=lambda row: max(row.rates.values()) * (SURE if row in replicas else 1))


def _row(
    target: PublishedTarget, gpu: Gpu, pair: PublishedPair, question: Question, n: int, cards: int, replicas: int
) -> Estimate:
    """Estimate the tokens per second of each way to serve a load on `replicas` equal servers of `cards` cards each."""
    block, shape = _block(target), target.shape
    fitting, returns = partial(_fitting, shape, question, cards), partial(_returns, shape, question, cards)
    tools = max(question.tools, 1e-9)  # above 0, so that the host's time counts
    layers = {"EAGLE3": 1, block: BLOCK_LAYERS, OURS: layers_of(target)}
    each = -(-n // replicas)

    def rate(way: str, pair: PublishedPair) -> float:
        at_once = max(min(each, fitting(layers.get(way, 0))), 1)
        sizes = question.prompt, question.answer
        load = SimulatedLoad(at_once, 4 * at_once + 40, *sizes, tools=tools, cached=question.context)
        copies, method = cards if way == OURS else 1, methods.get(way)
        card = _card(shape, gpu, cards, question.context, at_once, copies)
        if method is None:  # NGRAM's drafting is free
            card, method = replace(card, block=0.0), "dflash"
        rate = Simulation(card, load, method, pair=pair).run().rate
        return rate * min(replicas, n / at_once)

    def paying(way: str, rate: float, pays: int = HOST_TIER) -> float:
        beside = layers.get(way, 0)
        seconds = returns(beside)[pays] if fitting(beside) < each else 0.0
        return rate / (1 + rate / replicas * seconds / question.answer)

    ways = {"eagle3": "EAGLE3", "dflash": block, "auto": OURS}
    drafted = (method for method in METHODS if FIXED.get(method, arms.NONE) in (arms.NONE, *pair.drafts))
    methods = {ways.get(method, method): method for method in drafted}
    free = {way: rate(way, pair) for way in methods}
    free |= {"NGRAM": rate("NGRAM", NGRAM), OURS: free.pop(OURS)}
    rates = {way: paying(way, rate) for way, rate in free.items()}
    single = [pair._replace(lengths={name: lengths}) for name, lengths in pair.lengths.items()]
    # The mean over texts is included, so that it is within its range.
    over = [one / rates[PLAIN] for one in (rates[OURS], *(paying(OURS, rate(OURS, text)) for text in single))]
    returning = [
        Returning(pays, seconds, {way: paying(way, rate, at) for way, rate in free.items()})
        for at, (pays, seconds) in enumerate(zip(PAYS, returns(layers[OURS]), strict=True))
        if question.context and fitting(layers[OURS]) < each
    ]
    name, size = ("dp", replicas) if replicas > 1 else ("tp", cards)
    spread = f"--{name}-size {size}" if question.cards > 1 else ""
    load = count(n, "request") + (f", {name} {size}" if spread else "")
    return Estimate(load, spread, rates, min(over), max(over), replicas, returning)


def _settings(target: PublishedTarget, question: Question, row: Estimate, choice: str) -> Iterator[str]:
    """Yield commands to serve and to bench the target, with remarks on memory. row, choice: of the last load."""
    spread, parsers = (f" {text}" if text else "" for text in (row.spread, target.parsers))
    if question.context and row.replicas > 1:
        spread = ""
        yield "One server on each GPU, behind SGLang's router (cache_aware): it keeps prefixes, and drops cache_salt."
    if row.returning:
        cards = question.cards // row.replicas
        agents = -(-max(question.requests) // row.replicas)
        tokens = question.context + question.prompt + question.answer
        host = -int(-agents * tokens * _slot(target.shape, cards, layers_of(target)) // (1e9 * cards))
        parsers += f" --enable-session-radix-cache --enable-hierarchical-cache --hicache-size {host}"
        narrow = target.shape._replace(kv=target.shape.kv // 2, draft_kv=target.shape.draft_kv / 2)
        plain, ours = (row.replicas * _fitting(narrow, question, cards, n) for n in (0, layers_of(target)))
        yield (
            f"Host memory: {host} GB a GPU hold all agents' KV. Requests carry session_id (the SDK's Session sends "
            "it), so that agents' KV outlives other requests'; --radix-eviction-policy priority orders among them."
        )
        yield (
            f"--kv-cache-dtype fp8_e4m3: {plain} agents fit, {ours} beside {_drafters(target)}. Its text differs from "
            "that of 16-bit KV."
        )
    ways = _ways(target)
    if choice != OURS:
        drafter = ways.get(choice, () if choice in (PLAIN, "NGRAM") else ("DRAFTER",))[:1]
        flags = "" if choice == PLAIN else f" --speculative-algorithm {choice}"
        flags += "".join(f" --speculative-draft-model-path {name}" for name in drafter)
        yield f"sglang serve {shlex.quote(target.name)}{flags}{spread}{parsers}"
    drafters = (("--eagle3", target.eagle3), ("--dflash", target.block))
    parts = [f"{flag} {names[0]}" for flag, names in drafters if names]
    if not parts:
        yield "Train drafters: `whiflash train`; until then `whiflash serve` copies and drafts forced text."
        return
    yield f"whiflash bundle create --target {target.name} {' '.join(parts)} --out my-bundle"
    bound = f" --max-running-requests {max(question.requests)}" if max(question.requests) > 48 else ""
    yield f"whiflash serve {target.name} --speculative-draft-model-path my-bundle{spread}{parsers}{bound}"
    stock = ",".join((*ways, "NGRAM"))  # every drafter of the bundle, also one without published acceptance
    most = max(_fitting(target.shape, question, question.cards // row.replicas, layers_of(target)), 1)
    loads = ",".join(dict.fromkeys(str(min(-(-load // row.replicas), most)) for load in question.requests))
    arguments = f"--no-interleave --arms none,{stock},auto --concurrency {loads}"
    arguments += f' --server-args="{row.spread}"' if row.spread.startswith("--tp") else ""
    yield f"whiflash bench --model-path {target.name} --bundle my-bundle {arguments}"
