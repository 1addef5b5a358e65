"""Targets that have drafters, and what others published of them: `published.yaml`, facts with their sources.

Lengths are tokens of a round with the bonus token. They are of the checkpoints that the source names, which may be
others than those that are listed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from whiflash_sglang.files.disk import read_yaml


class Acceptance(NamedTuple):
    """lengths: data set → arm → tokens a round. drafts: arm → drafts of a round at which lengths were published."""

    lengths: Mapping[str, Mapping[str, float]]
    drafts: Mapping[str, int]
    source: str


class Ratio(NamedTuple):
    """Tokens a second over plain decoding, by requests, as published. what: the method, engine, device and data."""

    what: str
    by_requests: Mapping[int, str]


class Shape(NamedTuple):
    """parameters, active: of all experts, and of those that a token uses. layers. kv: bytes of a token of context.
    experts, used: of a layer, 0 in a dense model. expert_bytes: of a parameter of an expert.
    """

    parameters: float
    active: float
    layers: int
    kv: int
    experts: int = 0
    used: int = 0
    expert_bytes: float = 2.0


class PublishedTarget(NamedTuple):
    """A target. eagle3, block: its drafters, hub ids, first those that `acceptance` is of. ratios: of others."""

    name: str
    shape: Shape
    eagle3: tuple[str, ...]
    block: tuple[str, ...]
    acceptance: Acceptance | None = None
    ratios: tuple[Ratio, ...] = ()
    parsers: str = ""


FACTS = read_yaml(Path(__file__).with_suffix(".yaml"))
KNOWN = TypeAdapter(tuple[PublishedTarget, ...]).validate_python(FACTS)
"""By size."""


def known(target: str) -> PublishedTarget | None:
    """A target by its hub id or the end of it, case apart."""
    name = target.lower()
    names = ((entry, entry.name.lower()) for entry in KNOWN)
    return next((entry for entry, full in names if name in (full, full.split("/")[1])), None)
