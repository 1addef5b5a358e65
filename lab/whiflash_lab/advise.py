"""Should a target be served with WHIFLASH, and what would it bring? By published figures, or a server's own prices.

An estimate: nothing is measured but what a server says. `results/simulated.md` has the errors of the prices; those of
other cards, of several and of experts follow from a card's bandwidth, and no table confirms them. Imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from whiflash_lab.published import KNOWN, Acceptance, PublishedTarget, Shape, known
from whiflash_lab.simulate import (
    CONTEXT,
    FIXED,
    H100,
    METHODS,
    PARAMETERS,
    Card,
    PublishedPair,
    SimulatedLoad,
    Simulation,
)
from whiflash_sglang.cli.report import brought
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.progress import tracked

FULL = {arms.AR: 5, arms.DIFFUSION: 7}
"""Drafts of a full round, where published rounds have as many: WHIFLASH's longest chain, a block of eight rows."""
ERROR = 0.26
"""How much too high a ratio may be, by those that others measured on an H100 (`lab/tests/test_advise.py`)."""

WORTH_IT = 1.03
"""Speed over plain decoding below which drafting is not worth its memory."""


class Gpu(NamedTuple):
    """flops: bf16, a second. bandwidth: bytes a second. memory: bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


GPUS = {
    "h100": Gpu("H100", 989e12, 3.35e12, 80e9),
    "h200": Gpu("H200", 989e12, 4.8e12, 141e9),
    "h20": Gpu("H20", 148e12, 4.0e12, 96e9),
    "a100": Gpu("A100", 312e12, 2.04e12, 80e9),
    "b200": Gpu("B200", 2250e12, 8.0e12, 180e9),
}
"""By data sheet."""
_QWEN = Shape(PARAMETERS, PARAMETERS, 36, 147456)
_H100 = GPUS["h100"]
LAYER = (H100.fixed - 2 * PARAMETERS / _H100.bandwidth) / _QWEN.layers
"""Seconds of a layer beyond reading its weights: what is left of Qwen3-8B's published step on an H100."""
EXPERTS_LAYER = 90e-6
"""The same of a layer of experts, such that gpt-oss-120b's published 212 tokens a second on one H100 come out."""
REDUCE = 20e-6
"""Seconds of a layer's two reductions between cards: assumed."""
READ, WIDER = 1.8, 0.1
"""Seconds to read a token of a long context, over those of its bytes at the card's bandwidth, and what each further row
adds, of up to eight: an H200's (`results/gpu/verification.json`)."""
BLOCK_LAYERS = 5
"""Layers of a published block drafter; an EAGLE-3 drafter has one."""

LOST = (
    "Memory: drafters keep KV, a seventh of the pool for Qwen3-8B with two; `whiflash check --draft` names yours.",
    "Concurrency: --max-running-requests is 48 unless you set it, as for SGLang's own speculation.",
    "Start: some seconds to a minute for graphs and prices; prices are kept for the next start.",
    "Features: pipeline parallelism, and others that `whiflash check --recipe` names for your flags.",
    "Bits: greedy text may differ from plain decoding's where two tokens are nearly equal in bf16.",
    "Freedom: SGLang 0.5.23 or 0.5.22; a newer release waits for this plugin.",
)


class Question(NamedTuple):
    """requests: numbers of requests at once. tools: share of requests under a grammar. prompt, answer: tokens. context:
    tokens before a prompt that are cached.
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


class Estimate(NamedTuple):
    """Tokens a second by method at some requests. low, high: `auto` over plain on the worst and the best text."""

    requests: int
    rates: Mapping[str, float]
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.rates["auto"] / self.rates["plain"]

    @property
    def stock(self) -> str:
        """The fastest method of stock SGLang."""
        return max(STOCK, key=lambda method: self.rates.get(method, 0.0))

    @property
    def shown(self) -> str:
        over = self.rates["auto"] / self.rates[self.stock]
        beside = "" if self.stock == "plain" else f", {over:.2f} of SGLang's {STOCK[self.stock]},"
        return f"{self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}]{beside} at {self.requests}"

    @property
    def verdict(self) -> str:
        """It gains if it does with the error taken off, and if no algorithm of stock SGLang gains more."""
        if self.rates["auto"] < self.rates[self.stock] and self.stock != "plain":
            return f"Take SGLang's own {STOCK[self.stock]}"
        if self.ratio >= 1 + ERROR:
            return "Turn it on"
        return "Leave it off" if self.ratio < WORTH_IT else "Try it with `whiflash bench`"


@dataclass
class Advice:
    """assumed: in a line. published: ratios that others measured. obstacles: what stops a launch, or makes an estimate
    pointless.
    """

    assumed: str
    verdict: str
    rows: list[Estimate]
    published: list[str]
    eagle3: Sequence[str]
    block: Sequence[str]
    settings: list[str]
    lost: Sequence[str] = LOST
    obstacles: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        rows = [{**row._asdict(), "ratio": row.ratio} for row in self.rows]
        return {**vars(self), "rows": rows}


def advise(question: Question, state: Mapping[str, Any] | None = None) -> Advice:
    """An answer. state: of a server that runs the target, whose prices and acceptance are taken.

    Raises:
        ConfigError: no such card, or nothing is known of the target; a context beside `state`.
    """
    target = known(question.target)
    if state is not None:
        if question.context:
            raise ConfigError("--context does not go with --url: a server's prices are of its own contexts")
        card, pair, source = _of_server(state, question)
        target = target or PublishedTarget(question.target, _QWEN, (), ())
        own = _on_its_traffic(state)
        prices = "prices of the running server, host's time included"
    else:
        if target is None:
            raise ConfigError(
                f"{question.target}: nothing is known of it; name one of {', '.join(entry.name for entry in KNOWN)}, "
                "or give --url of a server that runs it"
            )
        card = _card(target.shape, _gpu(question.gpu), question.cards)
        acceptance, source = _acceptance(target)
        pair, own = _pair(acceptance), ""
        prices = (
            f"prices of {question.cards} × {card.name} bf16, fits to published tables scaled by bandwidth; ratios may "
            f"be {ERROR:.0%} too high"
        )
    loads = question.requests if pair.drafts else ()
    behind = (
        f" after {question.context:,} cached ones, read as an H200 reads them" if question.context else ""
    )
    rows = [
        _row(_far(card, target.shape, question, requests), pair, question, requests)
        for requests in tracked(loads, "simulating loads")
    ]
    advice = Advice(
        assumed=f"ESTIMATE, nothing measured here. {target.name}, {prices}. "
        f"Acceptance: {source}; yours at temperature {question.temperature:g} may differ. Prompts of "
        f"{question.prompt}, answers of {question.answer} tokens{behind}; {question.tools:.0%} of requests write calls "
        "of twenty tools under grammars, of which the host knows what it was measured to; no copies in the others.",
        verdict=_verdict(rows, own),
        rows=rows,
        published=[
            f"{entry.what}: {', '.join(f'{ratio} at {at}' for at, ratio in entry.by_requests.items())} requests"
            for entry in target.ratios
        ],
        eagle3=target.eagle3,
        block=target.block,
        settings=list(_settings(target, question, (state or {}).get("by_arm", {}))),
    )
    if state is None:
        weights, gpu = _bytes(target.shape), _gpu(question.gpu)
        if weights > 0.85 * gpu.memory * question.cards:
            advice.obstacles.append(
                f"{weights / 1e9:.0f} GB of weights do not fit {question.cards} × {gpu.name} of "
                f"{gpu.memory / 1e9:.0f} GB with KV beside them"
            )
        most, room = max(question.requests), max(gpu.memory * question.cards - weights, 0.0)
        if (kv := most * question.context * target.shape.kv) > room:
            advice.obstacles.append(
                f"{kv / 1e9:.0f} GB of KV for {most} × {question.context:,} tokens fit only if requests share them"
            )
    return advice


def _gpu(name: str) -> Gpu:
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu {name} is not one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def _split(shape: Shape) -> tuple[float, float]:
    """Bytes that every token reads, and bytes of all experts."""
    if not shape.experts:
        return 2 * shape.parameters, 0.0
    experts = (shape.parameters - shape.active) / (1 - shape.used / shape.experts)
    return 2 * (shape.parameters - experts), shape.expert_bytes * experts


def _bytes(shape: Shape) -> float:
    return sum(_split(shape))


def _card(shape: Shape, gpu: Gpu, count: int) -> Card:
    """Prices of a target on `count` cards."""
    always, experts = _split(shape)
    layer = (EXPERTS_LAYER if shape.experts else LAYER) + (REDUCE if count > 1 else 0.0)
    return Card(
        gpu.name,
        fixed=always / (gpu.bandwidth * count) + shape.layers * layer,
        row=2 * shape.active / (gpu.flops * count),
        token=H100.token * shape.kv / _QWEN.kv * _H100.bandwidth / (gpu.bandwidth * count),
        chain=H100.chain,
        block=H100.block,
        experts=experts / (gpu.bandwidth * count),
        share=shape.used / shape.experts if shape.experts else 1.0,
    )


def _far(card: Card, shape: Shape, question: Question, requests: int) -> Card:
    """`card` for requests of a long context each: its first `CONTEXT` tokens as before, the others by their bytes.

    Drafters read it, too.
    """
    if question.context <= CONTEXT:
        return card
    far = 1 - CONTEXT / question.context
    token = far * shape.kv / (_gpu(question.gpu).bandwidth * question.cards)
    layer = token * question.context * requests / shape.layers
    return replace(
        card,
        token=card.token * (1 - far) + (READ - WIDER) * token,
        deep=WIDER * token / requests,
        chain=card.chain + READ * layer,
        block=card.block + BLOCK_LAYERS * (READ + FULL[arms.DIFFUSION] * WIDER) * layer,
    )


def _acceptance(target: PublishedTarget) -> tuple[Acceptance, str]:
    if target.acceptance is not None:
        return target.acceptance, target.acceptance.source
    other = known("Qwen3-8B")
    if other is None or other.acceptance is None:
        raise AssertionError("Qwen3-8B is known")
    return other.acceptance, f"none is published, so Qwen3-8B's: {other.acceptance.source}"


def _pair(acceptance: Acceptance) -> PublishedPair:
    drafts = {arm: min(FULL[arm], drafted) for arm, drafted in acceptance.drafts.items()}
    return PublishedPair(acceptance.lengths, acceptance.drafts, drafts)


def _of_server(state: Mapping[str, Any], question: Question) -> tuple[Card, PublishedPair, str]:
    """Prices and acceptance that a server found. Raises ConfigError: it has drafted too little to say."""
    costs, by_arm = state.get("costs") or {}, state.get("by_arm") or {}
    drafted = {
        arm: (sums["tokens"] / sums["rounds"], max(1, round(sums["proposed"] / sums["rounds"])))
        for arm, sums in by_arm.items()
        if arm in FULL and sums["rounds"] >= 64
    }
    rounds = [sums["rounds"] for arm, sums in by_arm.items() if arm != arms.NONE]
    if max(rounds, default=0) < 64 or not costs.get("verify"):
        raise ConfigError(
            "the server has drafted in fewer than 64 rounds of a drafter: send it requests, then ask again"
        )
    row = max(costs.get("verify_draft", 0.0), 1e-9)
    draft = costs.get("draft") or {}
    drafts = {arm: longest for arm, (_, longest) in drafted.items()}
    card = Card(
        "server",
        fixed=costs["verify"] + costs.get("between", 0.0) - row,
        row=row,
        token=max(costs.get("verify_request", row) - row, 0.0) / (question.prompt + question.answer / 2),
        chain=draft.get(arms.AR, 0.0) / drafts.get(arms.AR, 1),
        block=draft.get(arms.DIFFUSION, 0.0),
    )
    lengths = {"its traffic": {arm: length for arm, (length, _) in drafted.items()}}
    return card, PublishedPair(lengths, drafts, drafts), "of its traffic since the start"


def _on_its_traffic(state: Mapping[str, Any]) -> str:
    """Verdict on what a server's own rounds brought, copies and forced text with them. Raises ConfigError."""
    gain = brought(state).gain
    verdict = "Turn it on" if gain >= WORTH_IT else "Leave it off"
    return f"{verdict}: {gain:.2f} over plain decoding on the server's own traffic, by its prices"


STOCK = {"plain": "plain decoding", "eagle3": "EAGLE-3", "dflash": "block drafter"}
"""Methods that SGLang has without this package."""


def _row(card: Card, pair: PublishedPair, question: Question, requests: int) -> Estimate:
    tools = max(question.tools, 1e-9)  # above 0, so that the host's time counts
    load = SimulatedLoad(
        requests, 4 * requests + 40, question.prompt, question.answer, tools=tools, cached=question.context
    )

    def rate(method: str, lengths: Mapping[str, Mapping[str, float]]) -> float:
        return Simulation(card, load, method, pair=pair._replace(lengths=lengths)).run().rate

    methods = [method for method in METHODS if FIXED.get(method, arms.NONE) in (arms.NONE, *pair.drafts)]
    rates = {method: rate(method, pair.lengths) for method in methods}
    ratios = [rate("auto", {name: lengths}) / rates["plain"] for name, lengths in pair.lengths.items()]
    return Estimate(requests, rates, min(ratios), max(ratios))


def _verdict(rows: Sequence[Estimate], own: str) -> str:
    """own: of a server that has seen its traffic, which no estimate of drafters alone overrules."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault("Drafters alone, an estimate" if own else row.verdict, []).append(row.shown)
    sentence = ". ".join(
        [*filter(None, [own]), *(f"{verdict}: {', '.join(shown)}" for verdict, shown in parts.items())]
    )
    if not rows:
        return f"{sentence}."
    return f"{sentence} (requests; tokens a second over plain decoding, range by data set)."


def _settings(target: PublishedTarget, question: Question, by_arm: Mapping[str, Any]) -> Iterator[str]:
    """by_arm: of a server that runs the target."""
    if FULL.keys() & by_arm.keys():
        yield "The server has drafters. `whiflash policy none --url URL` stops them while it serves, `auto` goes on."
        return
    parts = [
        *(f"--eagle3 {drafter}" for drafter in target.eagle3[:1]),
        *(f"--dflash {drafter}" for drafter in target.block[:1]),
    ]
    if not parts:
        yield "Train drafters: `whiflash train`; until then `whiflash serve` copies and drafts forced text."
        return
    yield f"whiflash bundle create --target {target.name} {' '.join(parts)} --out my-bundle"
    spread = f" --tp-size {question.cards}" if question.cards > 1 else ""
    parsers = f" {target.parsers}" if target.parsers else ""
    bound = f" --max-running-requests {max(question.requests)}" if max(question.requests) > 48 else ""
    yield f"whiflash serve {target.name} --speculative-draft-model-path my-bundle{spread}{parsers}{bound}"
