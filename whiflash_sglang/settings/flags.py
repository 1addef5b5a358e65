"""Flags that WHIFLASH adds to SGLang's command line, for every help text and for the docs. Imports no SGLang."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from whiflash_sglang.settings.config import Flags, flag_of

MEANING = {
    "eagle_draft": "EAGLE-3 checkpoint (directory or hub id), beside a DFlash draft path or instead of the bundle's.",
    "drafters": "df-e3 (the paper's name): all drafters that are named. none: no drafter, also if a bundle names some.",
    "router": "Policy: auto (most expected tokens a second), entropy or neural (the paper's rules), or one pinned arm. "
    "Default: auto; random is for tests.",
    "neural_router_path": "Neural router: hub id, directory or .safetensors file.",
    "neural_router_threshold": "Threshold on the neural router's output (tokens of acceptance length).",
    "eagle_steps": "Longest EAGLE-3 chain.",
    "block_size": "Longest DFlash block, bonus token included; at most the checkpoint's.",
    "lookup": "The copying arm. Default: the bundle's, else on.",
    "structure": "The arm of forced text. Default: the bundle's, else on.",
    "force_recorded": "For benchmarks only: requests may force their answer's tokens, which then are not the target's.",
    "trace_sample": "Share of requests, from 0 to 1, whose traces are written to --whiflash-trace-dir. Default: 0.",
    "trace_dir": "Directory for sampled traces, as JSON lines (see whiflash trace).",
    "trace_text": "Whether sampled traces hold the answer's text and stretches. Default: off, only sums.",
    "trace_mib": "Most MiB of sampled traces on disk; the oldest go first. Default: 64.",
    "learn": "Directory for token ids of finished requests, to train drafters on (docs/how-to/learning.md). "
    "Default: nothing is kept.",
    "learn_mib": "Most MiB of such samples on disk; the oldest go first. Default: 256.",
    "learn_hours": "Longest age of such samples, in hours. Default: 168.",
    "versions": "Directory of versions of the drafters' weights, to switch while serving. "
    "Default: versions in the directory of --whiflash-learn.",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of the command line. takes: its choices, or what kind of value. meaning: with the default, if any."""

    field: str
    name: str
    takes: str
    meaning: str


def flags() -> Iterator[Flag]:
    """Every flag, in the order of `Flags`."""
    for field, info in Flags.model_fields.items():
        default = "" if info.default is None else f" Default: {info.default}."
        yield Flag(field, flag_of(field), _takes(info.annotation), MEANING[field] + default)


def _takes(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "|".join(get_args(annotation))
    if origin is Annotated:
        return _takes(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return "|".join(_takes(part) for part in get_args(annotation) if part is not NoneType)
    return {int: "INTEGER", float: "NUMBER", str: "PATH"}[annotation]
