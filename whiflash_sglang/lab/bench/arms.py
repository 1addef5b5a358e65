"""What is compared, and the server behind each arm. Needs no server.

WHIFLASH's routers can be changed while serving, so those that learn nothing share one server. `auto` learns while
it serves and keeps a server of its own: what other routers do must not teach it.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from whiflash_sglang.arms import AR, DIFFUSION
from whiflash_sglang.checkpoints.hub import fetch
from whiflash_sglang.checkpoints.manifest import (
    MANIFEST,
    NEEDED,
    PARTS,
    check_arms,
    embedded_bundle,
    load_manifest,
)
from whiflash_sglang.checkpoints.members import member
from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.lab.bench.load import MODEL
from whiflash_sglang.lookup.copier import RULE_MATCH

NONE = "none"
STATIC = ("EAGLE3", "DFLASH", "DSPARK")
"""Upstream's arms of one drafter."""
WITH_WIDTH = ("EAGLE3", "DFLASH")
PINNED = ("ar", "diffusion")
"""WHIFLASH with one drafter."""
ELSEWHERE = {"DSpark": "DSPARK", "speculators DFlash": None, "speculators DSpark": None}
"""Formats of block drafters (`models/formats.py`) that upstream does not serve as DFLASH: its arm for them, or none."""
ROUTERS = {
    "auto": "auto",
    "neural": "neural",
    "entropy": "entropy",
    "ar": "ar",
    "diffusion": "diffusion",
    "lookup": "lookup",
    "pinned-none": "none",
}
AUTO, NO_HINTS = "auto", "auto-no-hints"
COPY_RULE, NO_LOOKUP, BAD = "copy-rule", "auto-no-lookup", "auto-bad-drafters"
NO_STRUCTURE, NO_FORMS = "auto-no-structure", "auto-no-forms"
VARIANTS = {COPY_RULE: COPY_RULE, **dict.fromkeys((NO_LOOKUP, NO_STRUCTURE, NO_FORMS, BAD), AUTO)}
"""Arms that serve a changed bundle (`bench/arms.py`), and their routers."""
KNOWN = (NONE, *STATIC, "NGRAM", *ROUTERS, *VARIANTS, NO_HINTS)
DRAFTERS = {"EAGLE3": (AR,), "DFLASH": (DIFFUSION,), "DSPARK": (DIFFUSION,)}
"""Upstream's arms, and the drafters of a bundle that they serve."""
QUICK = (NONE, "EAGLE3", "DFLASH", "auto")
BESIDE = "@beside"
"""Ends the name of an arm that another checkout of this project serves."""
SEVERAL = {"tp": "--tp-size", "dp": "--dp-size"}
"""`auto@tp2` is served by two ranks, `auto@dp2` by two replicas: the flags that ask for them."""
PREDICTION, USELESS = "prediction", "useless"
"""What requests of a recorded run bring along, after a plus: the recorded prediction, or another conversation's."""
_SPELLED = re.compile(
    rf"(?:{'|'.join(KNOWN)}|(?:{'|'.join(WITH_WIDTH)}):0*[1-9]\d*)"
    rf"(?:@(?:{'|'.join(SEVERAL)})(?:[2-9]|[1-9]\d+))?(?:{BESIDE})?"
)
RANKS = "@tp"
"""In the name of an arm on several ranks, whose sums are rounded otherwise than those of one device."""

_PINNED_INSTEAD = "the arm `diffusion` is WHIFLASH with this drafter alone"

EAGLE_STEPS = 5
"""Chain length of upstream's EAGLE3, as WHIFLASH's own default."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What every arm serves.

    target, bundle: directories. eagle3, dflash: the bundle's checkpoints, one of which may be missing. common:
    arguments of every server. variants: arm → the changed bundle that it serves, for the arms that are wanted. beside:
    another checkout of this project, which serves the arms whose names say so. block_format: of the block drafter, by
    its name in `models/formats.py`.
    """

    target: Path
    bundle: Path
    eagle3: Path | None
    dflash: Path | None
    dtype: str
    common: tuple[str, ...] = ()
    variants: Mapping[str, Path] = field(default_factory=dict)
    beside: Path | None = None
    block_format: str = "DFlash"

    @property
    def drafters(self) -> tuple[str, ...]:
        """Arms whose checkpoints are there."""
        return tuple(arm for arm, part in PARTS.items() if getattr(self, part))

    @property
    def on_cpu(self) -> bool:
        """Whether servers are told so."""
        return ("--device", "cpu") in pairwise(self.common)

    def hide_paths(self, arguments: Sequence[str]) -> list[str]:
        """`arguments` as they may be published: directories by what they hold."""
        names = {
            **{str(path): f"BUNDLE-OF-{arm}" for arm, path in self.variants.items()},
            **{str(getattr(self, PARTS[arm])): f"BUNDLE/{PARTS[arm]}" for arm in self.drafters},
            str(self.bundle): "BUNDLE",
            str(self.target): "TARGET",
        }
        shown = []
        for argument in arguments:
            for path, name in names.items():
                argument = argument.replace(path, name)
            shown.append(argument)
        return shown


@dataclass(frozen=True, slots=True)
class Arm:
    """One column of the comparison.

    server: key of the server that answers; router: to be set there, if any. request: fields of every request.
    checkout: of this project, that serves it; None: this one.
    """

    name: str
    server: str
    arguments: tuple[str, ...] = field(repr=False)
    router: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    checkout: Path | None = field(default=None, repr=False)


def check_names(names: Sequence[str], *, recorded: bool = False) -> None:
    """Refuse names that no arm has, before anything is loaded.

    Args:
        recorded: with --recorded, only routers and variants are played; each may bring a prediction.

    Raises:
        UsageError: a name is unknown or given twice.
    """
    if len(set(names)) != len(names):
        raise UsageError(f"--arms names an arm twice: {', '.join(names)}")
    for name in names:
        if recorded:
            kind, _, brings = name.partition("+")
            known: tuple[str, ...] = (*ROUTERS, *VARIANTS)
            right = kind in known and brings in ("", PREDICTION, USELESS)
            more = f"; each also with +{PREDICTION} or +{USELESS}"
        else:
            known = KNOWN
            right = _SPELLED.fullmatch(name) is not None
            more = f"; also EAGLE3:STEPS, DFLASH:BLOCK, and each with @tpN, @dpN or {BESIDE}"
        if not right:
            raise UsageError(f"--arms: {name!r} is not one of {', '.join(known)}{more}")


def build_arms(names: Sequence[str], subject: Subject) -> list[Arm]:
    """Arms by name; `EAGLE3:3` is a chain of 3 steps, `DFLASH:4` a block of 4, `auto@beside` what the other checkout
    does. Plain decoding is always among them.

    Raises:
        ConfigError: a name is unknown or given twice, needs a drafter that the bundle has not, or another checkout
            where there is none.
    """
    wanted = list(names) if NONE in names else [NONE, *names]
    check_names(wanted)
    arms = [_arm(name, subject) for name in wanted]
    if NO_HINTS not in wanted:
        return arms
    # Both sides of the comparison send their rounds with the answer, so that neither has less to do.
    traced = _hints({"trace": "full"})
    return [replace(arm, request=traced) if arm.name == AUTO else arm for arm in arms]


def _needed(kind: str) -> tuple[str, ...]:
    return DRAFTERS.get(kind) or NEEDED.get({**ROUTERS, **VARIANTS}.get(kind, ""), ())


def block_arm(block_format: str, on_cpu: bool) -> str:
    """The arm of a bundle's block drafter alone: upstream's for its format (DSPARK: on GPUs only), else WHIFLASH's."""
    upstream = ELSEWHERE.get(block_format, "DFLASH")
    return "diffusion" if upstream is None or (upstream == "DSPARK" and on_cpu) else upstream


def those_with_drafters(names: Sequence[str], subject: Subject) -> list[str]:
    """Those arms of `names` that the bundle has drafters for, its `block_arm` in the place of upstream's others."""
    there = [name for name in names if set(_needed(name)) <= set(subject.drafters)]
    own = block_arm(subject.block_format, subject.on_cpu)
    return list(dict.fromkeys(own if name in ("DFLASH", "DSPARK") else name for name in there))


def _arm(name: str, subject: Subject) -> Arm:
    if name.endswith(BESIDE):
        if subject.beside is None:
            raise ConfigError(f"--arms: {name!r} needs --beside DIRECTORY, another checkout of this project")
        arm = _arm(name.removesuffix(BESIDE), subject)
        return replace(arm, name=name, server=arm.server + BESIDE, checkout=subject.beside)
    kind, at, several = name.partition("@")
    if at:
        arm = _arm(kind, subject)
        arguments = (*arm.arguments, SEVERAL[several[:2]], several[2:])
        return replace(arm, name=name, server=f"{arm.server}@{several}", arguments=arguments)
    kind, _, width = name.partition(":")
    check_arms(f"--arms {kind}", _needed(kind), subject.drafters)
    common = ("--model-path", str(subject.target), "--dtype", subject.dtype, *subject.common)
    if kind == NONE:
        return Arm(name, name, common)
    if kind in ROUTERS:
        own = kind == AUTO
        return Arm(
            name,
            f"WHIFLASH {kind}" if own else "WHIFLASH",
            (*common, *_whiflash(subject.bundle)),
            ROUTERS[kind],
        )
    if kind in VARIANTS:
        return Arm(name, f"WHIFLASH {kind}", (*common, *_whiflash(subject.variants[kind])), VARIANTS[kind])
    if kind == NO_HINTS:
        unhinted, whiflash = _hints({"infer": False, "trace": "full"}), _whiflash(subject.bundle)
        return Arm(name, f"WHIFLASH {kind}", (*common, *whiflash), ROUTERS[AUTO], unhinted)
    return Arm(name, name, (*common, "--speculative-algorithm", kind, *_upstream(kind, width, subject)))


def _hints(given: Mapping[str, bool | str]) -> dict[str, Any]:
    """A request's fields that carry hints."""
    from whiflash_sdk import Hints  # with the OpenAI client behind it, which names of arms do not need

    return Hints.model_validate(given).extra_body()


def _whiflash(bundle: Path) -> tuple[str, ...]:
    return ("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(bundle))


def _upstream(kind: str, width: str, subject: Subject) -> tuple[str, ...]:
    if kind == "EAGLE3":
        steps = width or str(EAGLE_STEPS)
        chain = ("--speculative-num-steps", steps, "--speculative-eagle-topk", "1")
        drafts = ("--speculative-num-draft-tokens", str(int(steps) + 1))
        return ("--speculative-draft-model-path", str(subject.eagle3), *chain, *drafts)
    if kind in ("DFLASH", "DSPARK"):
        if ELSEWHERE.get(subject.block_format, "DFLASH") != kind:
            raise ConfigError(
                f"--arms {kind}: upstream's does not read {subject.block_format} checkpoints such as {subject.dflash}; "
                f"{_PINNED_INSTEAD}"
            )
        if kind == "DSPARK" and subject.on_cpu:
            raise ConfigError(f"--arms DSPARK: upstream serves it on GPUs only; {_PINNED_INSTEAD}")
        block = ("--speculative-num-draft-tokens", width) if width else ()
        return ("--speculative-draft-model-path", str(subject.dflash), *block)
    return ()


def write_variant(arm: str, bundle: Path, directory: Path) -> Path:
    """Make the new `directory` a bundle that differs from `bundle` in what `arm` is about; returns it.

    Files that do not change are links to the bundle's, where the file system allows.

    Raises:
        ValueError: an arm without a variant.
    """
    fields = load_manifest(bundle).model_dump(mode="json", exclude_none=True)
    if arm == COPY_RULE:
        fields["lookup"] = {**fields.get("lookup", {}), "enabled": True, "min_match": RULE_MATCH}
    elif arm not in (NO_LOOKUP, NO_STRUCTURE, NO_FORMS, BAD):
        raise ValueError(f"{arm} serves the bundle as it is")
    if arm == NO_FORMS:
        fields["lookup"] = {**fields.get("lookup", {}), "form_tokens": 0}
    if arm in (NO_LOOKUP, BAD):
        fields["lookup"] = {"enabled": False}
    if arm in (NO_STRUCTURE, BAD):
        fields["structure"] = {"enabled": False}
    shutil.copytree(bundle, directory, copy_function=_link)
    if arm == BAD:
        fields.pop("router", None)
        for part in {"eagle3", "dflash"} & fields.keys():
            _shuffle(directory / fields[part])
    (directory / MANIFEST).unlink()  # it is the bundle's own
    (directory / MANIFEST).write_text(json.dumps(fields), encoding="utf-8")
    return directory


def _link(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _shuffle(checkpoint: Path) -> None:
    """Shuffle every matrix of a drafter: as slow as before, never right."""
    random = torch.Generator().manual_seed(0)
    for file in checkpoint.glob("*.safetensors"):
        shuffled = {name: _shuffled(value, random) for name, value in load_file(file).items()}
        file.unlink()  # it is the bundle's own
        save_file(shuffled, file)


def _shuffled(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    if tensor.ndim < 2:
        return tensor
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=random)].view_as(tensor).contiguous()


CPU_KV_TOKENS = 16384
"""KV pool of a server on the CPU. All servers share the machine's memory when arms are interleaved."""


def build_subject(
    model_path: str | None,
    bundle_path: str | None,
    dtype: str,
    extra: Sequence[str],
    scratch: Path,
    arms: Iterable[str],
    beside: Path | None = None,
) -> Subject:
    """Find target and bundle, and the arguments that every arm shares.

    Args:
        model_path, bundle_path: directories or hub ids; None: the embedded ones.
        extra: further server arguments, for every arm. scratch: an existing directory that outlives the servers.
        arms: names of what is compared; those that serve a changed bundle get it under `scratch`.
        beside: another checkout of this project, for the arms whose names ask for it.

    Raises:
        ConfigError: something is not there.
    """
    if beside is not None and not (beside / "whiflash_sglang" / "__init__.py").is_file():
        raise ConfigError(f"--beside {beside}: no checkout of this project")
    from whiflash_sglang.embedded import ensure_target
    from whiflash_sglang.models.formats import read_draft
    from whiflash_sglang.platform import activate

    target = ensure_target() if model_path is None else fetch(model_path)
    bundle = embedded_bundle() if bundle_path is None else fetch(bundle_path)
    manifest = load_manifest(bundle)
    common = ["--served-model-name", MODEL]
    if manifest.chat_template:
        common += ["--chat-template", str(bundle / manifest.chat_template)]
    if manifest.tool_call_parser:
        common += ["--tool-call-parser", manifest.tool_call_parser]
    if activate() is not None:
        common += ["--device", "cpu", "--max-total-tokens", str(CPU_KV_TOKENS)]
    dflash = member(bundle, manifest, "dflash") if manifest.dflash else None
    changed = VARIANTS.keys() & {name.partition("@")[0] for name in arms}
    return Subject(
        target=target,
        bundle=bundle,
        eagle3=member(bundle, manifest, "eagle3") if manifest.eagle3 else None,
        dflash=dflash,
        dtype=dtype,
        common=(*common, *extra),
        variants={arm: write_variant(arm, bundle, scratch / arm) for arm in changed},
        beside=None if beside is None else beside.resolve(),
        block_format="" if dflash is None else read_draft(dflash, DIFFUSION).format.name,
    )
