"""Targets that have drafters, cards, and what others published of them: `published.yaml`, facts with their sources.

Lengths are tokens of a round with the bonus token. They are of the checkpoints that the source names, which may be
others than those that are listed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from whiflash_sglang.files.disk import read_yaml


class Gpu(NamedTuple):
    """By data sheet. flops: bf16, a second. bandwidth: bytes a second. memory: bytes."""

    name: str
    flops: float
    bandwidth: float
    memory: float


class Acceptance(NamedTuple):
    """lengths: data set → arm → tokens a round. drafts: arm → drafts of a round at which lengths were published."""

    lengths: Mapping[str, Mapping[str, float]]
    drafts: Mapping[str, int]
    source: str


class Ratio(NamedTuple):
    """Tokens a second over plain decoding, or plain decoding's own, by requests, as published.

    what: the method, engine, device and data. estimated: the same by `advise`, using: a card, an arm, tokens and drafts
    of a round, tokens of a prompt.
    """

    what: str
    by_requests: Mapping[int, str]
    estimated: Mapping[int, float] = {}
    using: tuple[str, str, float, int, int] | None = None

    @property
    def shown(self) -> str:
        """How far an estimate is off is in brackets."""
        off = {at: f" ({rate / float(self.by_requests[at]) - 1:+.0%})" for at, rate in self.estimated.items()}
        rates = ", ".join(f"{rate} at {at}{off.get(at, '')}" for at, rate in self.by_requests.items())
        return f"{self.what}: {rates}"


class Shape(NamedTuple):
    """parameters, active: of all experts, and of those that a token uses. kv: bytes of a token of context. positions:
    tokens of the longest text. experts, used: of a layer, 0 in a dense model. expert_bytes: of an expert's parameter.
    """

    parameters: float
    active: float
    layers: int
    kv: int
    positions: int = 1 << 30
    experts: int = 0
    used: int = 0
    expert_bytes: float = 2.0


class PublishedTarget(NamedTuple):
    """A target. eagle3, block: its drafters, hub ids, first those that `acceptance` is of. ratios: of others."""

    name: str
    shape: Shape
    eagle3: tuple[str, ...]
    block: tuple[str, ...]
    acceptance: Acceptance = Acceptance({}, {}, "")
    ratios: tuple[Ratio, ...] = ()
    parsers: str = ""


class Facts(NamedTuple):
    """copies: what copies and forced text brought in our reports. lost: what WHIFLASH costs. targets: by size."""

    cards: dict[str, Gpu]
    copies: tuple[str, ...]
    lost: tuple[str, ...]
    targets: tuple[PublishedTarget, ...]


FACTS = TypeAdapter(Facts).validate_python(read_yaml(Path(__file__).with_suffix(".yaml")))
KNOWN = FACTS.targets


def known(target: str) -> PublishedTarget | None:
    """A target by the end of its hub id or of its directory, case apart."""
    name = target.lower().rstrip("/").split("/")[-1]
    return next((entry for entry in KNOWN if entry.name.lower().split("/")[1] == name), None)
