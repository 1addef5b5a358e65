"""What WHIFLASH adds to SGLang's command line, for every help text and for the documentation. Imports no SGLang."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from whiflash_sglang.config import Flags, flag_of

MEANING = {
    "eagle_draft": "EAGLE-3 checkpoint (directory or hub id) beside the draft path's DFlash checkpoint, or in place of "
    "the bundle's.",
    "drafters": "Drafter pair: df-e3, DFlash and EAGLE-3.",
    "router": "How rounds are routed: auto (expected tokens per second of the batch), entropy or neural (the "
    "paper's, per request), or one arm pinned: ar, diffusion, lookup, none. copy-rule (copy where possible, "
    "else EAGLE-3) is a baseline, random exists for tests.",
    "neural_router_path": "Neural router: hub id, directory or .safetensors file.",
    "neural_router_threshold": "Threshold on the neural router's output (tokens of acceptance length).",
    "neural_router_sign": "What the router file predicts, where it does not say: ar-minus-diffusion or "
    "diffusion-minus-ar.",
    "entropy_threshold": "Entropy router: leave the diffusion drafter above this many nats.",
    "min_dwell": "Rounds a request keeps its drafter at least before switching.",
    "eagle_steps": "Length of the EAGLE-3 chain, at most.",
    "block_size": "DFlash block to draft, bonus token included; at most the checkpoint's own.",
    "dflash_vocabulary": "What DFlash drafts from: full, or the reduced vocabulary of the eagle3 checkpoint (cheaper "
    "for small targets). Default: the bundle's, else full.",
    "lookup": "The copying arm: on or off. Default: as the bundle says, else on.",
    "lookup_memory_mib": "MiB of recent outputs to copy from in later requests of the same cache salt and extra key; "
    "0 keeps none. Default: the bundle's, else 0.",
    "lookup_prediction_tokens": "Tokens of a prediction (predicted outputs) that are read; the rest is left out. "
    "Default: the bundle's, else 16384.",
    "lookup_form_tokens": "Tokens of emission forms (the prompt as it would be quoted in JSON or code) that are made "
    "for one request at most; 0 for none. Default: the bundle's, else 32768.",
    "structure": "The arm that drafts what grammars force: on or off. Default: as the bundle says, else on.",
    "backlog_tokens": "Features parked per request for the idle drafter before they are flushed into its KV.",
    "branches": "Chains of one request that a round verifies at most, from 1 to 4. Beyond the first are what other "
    "arms would go on with at no pass of a model. On CUDA devices: 1.",
    "force_recorded": "For benchmarks only: requests may force the tokens of their answers, which then are not the "
    "target's.",
    "trace_sample": "Share of requests, from 0 to 1, whose traces are written to --whiflash-trace-dir. Default: 0.",
    "trace_dir": "Directory for sampled traces, as JSON lines (see whiflash trace).",
    "trace_text": "Whether sampled traces have the answer's text and its stretches: on or off. Default: off, only "
    "sums.",
    "trace_mib": "MiB that sampled traces may take on disk; the oldest go. Default: 64.",
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
