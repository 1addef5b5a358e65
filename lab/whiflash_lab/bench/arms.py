"""Defines the arms that are compared, and the server of each. Needs no server.

WHIFLASH's router can be changed while it serves, so routers that learn nothing share one server. `auto` learns while
it serves and has a server of its own, so that other routers' rounds do not teach it.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints.manifest import NEEDED, PARTS, check_arms
from whiflash_sglang.drafts.arms import AR, DIFFUSION
from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.files.provenance import without_secrets
from whiflash_sglang.formats.draft_format import DraftFormat

NONE = "none"
STATIC = ("EAGLE3", "DFLASH", "DSPARK")
"""SGLang's own arms with one drafter."""
WITH_WIDTH = ("EAGLE3", "DFLASH")
PINNED = ("ar", "diffusion")
"""Arms of WHIFLASH pinned to one drafter."""
ROUTERS = {name: name for name in ("auto", "neural", "entropy", *PINNED, "lookup")} | {"pinned-none": "none"}
AUTO, NO_HINTS = "auto", "auto-no-hints"
FLAGS = {"auto-no-drafters": ("--whiflash-drafters", "none")}
"""Arms that serve the bundle with other flags."""
NO_LOOKUP, BAD = "auto-no-lookup", "auto-bad-drafters"
NO_STRUCTURE = "auto-no-structure"
VARIANTS = dict.fromkeys((NO_LOOKUP, NO_STRUCTURE, BAD), AUTO)
"""Arms that serve a changed bundle (`subject.py`), and their routers."""
ADAPTIVE = "EAGLE3-adaptive"
"""SGLang's EAGLE3 with a chain length that follows acceptance (`--speculative-adaptive`)."""
KNOWN = (NONE, *STATIC, ADAPTIVE, "NGRAM", *ROUTERS, *VARIANTS, *FLAGS, NO_HINTS)
DRAFTERS = {"EAGLE3": (AR,), ADAPTIVE: (AR,), "DFLASH": (DIFFUSION,), "DSPARK": (DIFFUSION,)}
"""SGLang's own arms → the drafters of a bundle that they serve."""
DEFAULT = (NONE, "EAGLE3", "DFLASH", "auto")
PREDICTED, SESSIONS, GROUP = ("prediction", "useless"), "sessions", "group"
MEANS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(PREDICTED, ()),
    SESSIONS: ("--enable-session-radix-cache",),
    GROUP: (),
    "tlru": (
        *("--radix-eviction-policy", "tlru", "--radix-eviction-policy-config"),
        '{"threshold": 4096, "next_prompt_estimate": 512}',
    ),
    "lpm": ("--schedule-policy", "lpm"),
    "host": ("--enable-hierarchical-cache",),
}
"""Suffixes of a recorded run's arms, each after a plus → flags of the server. Requests of the first two bring the
recorded or another conversation's prediction; with sessions each conversation has a `session_id`, with group the name
of its task."""
_SPELLED = re.compile(rf"(?:{'|'.join(KNOWN)}|(?:{'|'.join(WITH_WIDTH)}):0*[1-9]\d*)")

_PINNED_INSTEAD = "the arm `diffusion` is WHIFLASH with only this drafter"

EAGLE_STEPS = 5
"""Chain length of SGLang's EAGLE3, the same as WHIFLASH's default."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The models and arguments with which every arm serves.

    target, bundle: directories. eagle3, dflash: the bundle's checkpoints, one of which may be missing. common:
    arguments of every server. variants: arm → the changed bundle that it serves. block_format: format of the block
    drafter, None without one. chain_is_upstreams: whether SGLang's EAGLE3 can read the chain drafter.
    """

    target: Path
    bundle: Path
    eagle3: Path | None
    dflash: Path | None
    dtype: str
    common: tuple[str, ...] = ()
    variants: Mapping[str, Path] = field(default_factory=dict)
    block_format: DraftFormat | None = None
    chain_is_upstreams: bool = True

    @property
    def drafters(self) -> tuple[str, ...]:
        """Drafter arms (`ar`, `diffusion`) whose checkpoints the bundle has."""
        return tuple(arm for arm, part in PARTS.items() if getattr(self, part))

    @property
    def on_cpu(self) -> bool:
        """Whether the servers' arguments choose the CPU."""
        return ("--device", "cpu") in pairwise(self.common)

    def hide_paths(self, arguments: Sequence[str]) -> list[str]:
        """Return `arguments` for publishing: keys removed, paths replaced by names such as TARGET or BUNDLE."""
        names = {
            **{str(path): f"BUNDLE-OF-{arm}" for arm, path in self.variants.items()},
            **{str(getattr(self, PARTS[arm])): f"BUNDLE/{PARTS[arm]}" for arm in self.drafters},
            str(self.bundle): "BUNDLE",
            str(self.target): "TARGET",
        }
        words = without_secrets(arguments)
        return [reduce(lambda text, known: text.replace(*known), names.items(), word) for word in words]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to serve that a benchmark compares with others.

    server: key of the server that answers; router: to be set there, if any. request: fields of every request. means:
    its additions (`auto+lpm`: `lpm`), keys of `MEANS`; only in a recorded run.
    """

    name: str
    server: str
    arguments: tuple[str, ...] = field(repr=False)
    router: str | None = None
    request: Mapping[str, Any] = field(default_factory=dict)
    means: tuple[str, ...] = ()


def server_words(text: str) -> list[str]:
    """Split --server-args into words, `--flag=value` into two: whoever reads them looks for a value after its flag.

    Raises UsageError if a quotation has no end.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--server-args {text}: {error}") from None
    parted = (re.fullmatch("(--[^=]+)=([^-].*)", word, re.DOTALL) for word in words)
    return [part for word, both in zip(words, parted, strict=True) for part in (both.groups() if both else [word])]


def dtype_of(extra: Sequence[str]) -> str:
    """Return the dtype in server arguments, else bfloat16. Raises UsageError if answers cannot be compared in it."""
    dtype = ["bfloat16", *(value for flag, value in pairwise(extra) if flag == "--dtype")][-1]
    if dtype not in ("bfloat16", "float32"):
        raise UsageError(f"--server-args --dtype {dtype}: answers are compared in bfloat16 or float32")
    return dtype


def check_names(names: Sequence[str], *, recorded: bool = False) -> None:
    """Refuse names that no arm has, before anything is loaded.

    Args:
        recorded: with --recorded, only plain decoding, routers and variants are played, each with `MEANS`.

    Raises:
        UsageError: a name is unknown or given twice.
    """
    if len(set(names)) != len(names):
        raise UsageError(f"--arms names an arm twice: {', '.join(names)}")
    for name in names:
        if recorded:
            kind, *means = name.split("+")
            names_known: tuple[str, ...] = (NONE, *ROUTERS, *VARIANTS, *FLAGS)
            right = kind in names_known and set(means) <= MEANS.keys()
            more = f"; each also with {', '.join(f'+{means}' for means in MEANS)}"
        else:
            names_known = KNOWN
            right = _SPELLED.fullmatch(name) is not None
            more = "; also EAGLE3:STEPS, DFLASH:BLOCK"
        if not right:
            raise UsageError(f"--arms: {name!r} is not one of {', '.join(names_known)}{more}")


def build_arms(names: Sequence[str], subject: Subject) -> list[Arm]:
    """Build arms by name. `EAGLE3:3` is a chain of 3 steps, `DFLASH:4` a block of 4. Plain decoding is always one.

    Raises:
        ConfigError: a name is unknown or given twice, or needs a drafter that the bundle lacks.
    """
    chosen = list(names) if NONE in names else [NONE, *names]
    check_names(chosen)
    return [_arm(name, subject) for name in chosen]


def _needed(kind: str) -> tuple[str, ...]:
    return DRAFTERS.get(kind) or NEEDED.get({**ROUTERS, **VARIANTS}.get(kind, ""), ())


def block_arm(block_format: DraftFormat | None, on_cpu: bool) -> str:
    """Return the arm with only the block drafter: SGLang's for its format (DSPARK: GPUs only), else WHIFLASH's."""
    upstream = None if block_format is None else block_format.upstream
    return "diffusion" if upstream is None or (upstream == "DSPARK" and on_cpu) else upstream


def those_with_drafters(names: Sequence[str], subject: Subject) -> list[str]:
    """Return the arms of `names` whose drafters the bundle has; one that SGLang lacks becomes WHIFLASH's pinned arm."""
    there = [name for name in names if set(_needed(name)) <= set(subject.drafters)]
    own = dict.fromkeys(("DFLASH", "DSPARK"), block_arm(subject.block_format, subject.on_cpu))
    own |= {} if subject.chain_is_upstreams else dict.fromkeys(("EAGLE3", ADAPTIVE), "ar")
    return list(dict.fromkeys(own.get(name, name) for name in there))


def _arm(name: str, subject: Subject) -> Arm:
    kind, _, width = name.partition(":")
    check_arms(f"--arms {kind}", _needed(kind), subject.drafters)
    common = ("--model-path", str(subject.target), "--dtype", subject.dtype, *subject.common)
    if kind == NONE:
        return Arm(name, name, common)
    if kind in (*ROUTERS, *VARIANTS, *FLAGS, NO_HINTS):
        server = "WHIFLASH" if kind in ROUTERS and kind != AUTO else f"WHIFLASH {kind}"
        bundle = subject.variants[kind] if kind in VARIANTS else subject.bundle
        drafted = ("--speculative-algorithm", "WHIFLASH", "--speculative-draft-model-path", str(bundle))
        request: Mapping[str, Any] = {}
        if kind == NO_HINTS:
            # Imported here because it brings the OpenAI client, which checks of arms' names do not need.
            from whiflash_sdk import Hints

            request = Hints(infer=False).extra_body()
        return Arm(name, server, (*common, *drafted, *FLAGS.get(kind, ())), ROUTERS.get(kind, AUTO), request)
    algorithm = "EAGLE3" if kind == ADAPTIVE else kind
    return Arm(name, name, (*common, "--speculative-algorithm", algorithm, *_upstream(kind, width, subject)))


def _upstream(kind: str, width: str, subject: Subject) -> tuple[str, ...]:
    if kind in ("EAGLE3", ADAPTIVE) and not subject.chain_is_upstreams:
        raise ConfigError(
            f"--arms {kind}: upstream's does not read {subject.eagle3}; the arm `ar` is WHIFLASH with only this drafter"
        )
    if kind == "EAGLE3":
        steps = width or str(EAGLE_STEPS)
        chain = ("--speculative-num-steps", steps, "--speculative-eagle-topk", "1")
        drafts = ("--speculative-num-draft-tokens", str(int(steps) + 1))
        return ("--speculative-draft-model-path", str(subject.eagle3), *chain, *drafts)
    if kind == ADAPTIVE:
        return ("--speculative-draft-model-path", str(subject.eagle3), "--speculative-adaptive")
    if kind in ("DFLASH", "DSPARK"):
        block = subject.block_format
        if block is None or block.upstream != kind:
            raise ConfigError(
                f"--arms {kind}: upstream's does not read {block.name if block else 'unknown'} checkpoints such as "
                f"{subject.dflash}; {_PINNED_INSTEAD}"
            )
        if kind == "DSPARK" and subject.on_cpu:
            raise ConfigError(f"--arms DSPARK: upstream serves it on GPUs only; {_PINNED_INSTEAD}")
        rows = ("--speculative-num-draft-tokens", width) if width else ()
        return ("--speculative-draft-model-path", str(subject.dflash), *rows)
    return ()
