"""Reads `published.yaml`: targets with drafters, GPUs, and figures that others published, with their sources.

Lengths are tokens per round, bonus token included. They belong to the checkpoints that the source names, which may
differ from those that are listed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from whiflash_sglang.files.disk import read_yaml


class Gpu(NamedTuple):
    """A GPU's data sheet. flops: bf16 operations per second. bandwidth: bytes per second. memory: bytes. host: bytes
    per second from host memory, assumed to be four fifths of PCIe's.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    host: float = 50e9


class Acceptance(NamedTuple):
    """Published acceptance. lengths: data set → arm → tokens per round. drafts: arm → drafts of a published round."""

    lengths: Mapping[str, Mapping[str, float]]
    drafts: Mapping[str, int]
    source: str


class Ratio(NamedTuple):
    """A published ratio of tokens per second over plain decoding, or plain decoding's rate, by number of requests.

    what: the method, engine, device and data. estimated: the same ratios by `advise`. using: inputs of the estimate: a
    card, an arm, tokens and drafts of a round, tokens of a prompt.
    """

    what: str
    by_requests: Mapping[int, str]
    estimated: Mapping[int, float] = {}
    using: tuple[str, str, float, int, int] | None = None

    @property
    def shown(self) -> str:
        """Text with the published figures, and in brackets how far an estimate is off."""
        off = {at: f" ({rate / float(self.by_requests[at]) - 1:+.0%})" for at, rate in self.estimated.items()}
        rates = ", ".join(f"{rate} at {at}{off.get(at, '')}" for at, rate in self.by_requests.items())
        return f"{self.what}: {rates}"


class Shape(NamedTuple):
    """Sizes of a model. parameters, active: with all experts, and with those that a token uses. kv: bytes per token of
    context. positions: tokens of the longest text. experts, used: experts of a layer, and those that a token uses, 0 in
    a dense model. expert_bytes: bytes of an expert's parameter. width: elements of a token's query per layer, as a mean
    in which layers with a window count as 0.
    """

    parameters: float
    active: float
    layers: int
    kv: int
    positions: int = 1 << 30
    experts: int = 0
    used: int = 0
    expert_bytes: float = 2.0
    width: int = 4096


class PublishedTarget(NamedTuple):
    """A target. eagle3, block: hub ids of its drafters, first those that `acceptance` describes. ratios: published."""

    name: str
    shape: Shape
    eagle3: tuple[str, ...]
    block: tuple[str, ...]
    acceptance: Acceptance = Acceptance({}, {}, "")
    ratios: tuple[Ratio, ...] = ()
    parsers: str = ""


class Facts(NamedTuple):
    """Contents of the file. copies: gains of copies and forced text in our reports. lost: costs of WHIFLASH."""

    cards: dict[str, Gpu]
    copies: tuple[str, ...]
    lost: tuple[str, ...]
    targets: tuple[PublishedTarget, ...]


FACTS = TypeAdapter(Facts).validate_python(read_yaml(Path(__file__).with_suffix(".yaml")))
KNOWN = FACTS.targets


def known(target: str) -> PublishedTarget | None:
    """Return the target with this last part of its hub id or directory, ignoring case, or None."""
    name = target.lower().rstrip("/").split("/")[-1]
    return next((entry for entry in KNOWN if entry.name.lower().split("/")[1] == name), None)
