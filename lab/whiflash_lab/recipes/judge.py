"""Judges a launch by its flags, without SGLang, weights or a GPU, and if need be without the target's configuration.

The rules are those of a start (:mod:`whiflash_sglang.engine.launch.refusals`). Flags are read by `flags.json`, which
`scripts/upstream.py --record` writes of SGLang's own parser. Flags of SGLang's other algorithms count as replaced by
WHIFLASH. Only a target's `config.json` is read by SGLang, which is imported for it.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from whiflash_sglang.engine.carried import ALGORITHM
from whiflash_sglang.engine.launch.facts import DISABLED, Launch, fill_in, fill_in_for_cuda
from whiflash_sglang.engine.launch.refusals import FOREIGN, UNCAPTURED, refusals_of
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import read_text
from whiflash_sglang.files.jsonl import read_json, read_json_file
from whiflash_sglang.files.progress import tracked
from whiflash_sglang.settings.config import Flags, flag_of, parse_flags

Flag = str | Sequence[str]
"""A flag's value: `true` or `false` for a switch, words for a list. Empty: a switch that is on, or a value that is not
known, as is one that holds a variable, which may be several words."""
_MORE_THAN_ONE = "2"
_EAGLE = "arm `ar`, with an EAGLE-3 checkpoint or the target's own next-token head"
ALGORITHMS = {
    **dict.fromkeys(("EAGLE", "EAGLE3", "NEXTN"), _EAGLE),
    **dict.fromkeys(("DFLASH", "DSPARK"), "arm `diffusion`, with a DFlash or DSpark checkpoint"),
    "NGRAM": "arm `lookup`, which copies from the request's text",
}
"""SGLang's algorithms → the arm of WHIFLASH that drafts like them."""
SETTINGS = {
    "speculative_num_steps": "--whiflash-eagle-steps, the longest chain",
    "speculative_num_draft_tokens": "--whiflash-block-size, the longest block",
}
"""Flags of SGLang's algorithms → the flag of WHIFLASH that bounds the same length; rounds choose lengths below it."""
RENAMED = {
    "--mamba-scheduler-strategy": "--mamba-radix-cache-strategy",
    "--cuda-graph-max-bs": "--cuda-graph-max-bs-decode",
    "--cuda-graph-bs": "--cuda-graph-bs-decode",
    "--piecewise-cuda-graph-max-tokens": "--cuda-graph-max-bs-prefill",
    "--piecewise-cuda-graph-tokens": "--cuda-graph-bs-prefill",
    "--disable-piecewise-cuda-graph": "--cuda-graph-backend-prefill disabled",
    "--enable-breakable-cuda-graph": "--cuda-graph-backend-prefill breakable",
    "--speculative-dflash-draft-window-size": "--speculative-draft-window-size",
    "--stream-output": "--incremental-streaming-output",
    "--enable-gdn-replayssm-spec": "--enable-linear-replayssm-spec",
    **{f"--nsa-{phase}-backend": f"--dsa-{phase}-backend" for phase in ("prefill", "decode")},
    **dict.fromkeys(
        ("--enable-nsa-prefill-context-parallel", "--enable-prefill-context-parallel"), "--enable-prefill-cp"
    ),
    "--enable-ep-moe": "--ep-size <tp-size>",
    "--enable-deepep-moe": "--moe-a2a-backend deepep",
    "--enable-triton-kernel-moe": "--moe-runner-backend triton_kernel",
    **{
        f"--enable-flashinfer-{name}-moe": f"--moe-runner-backend flashinfer_{name}"
        for name in ("cutedsl", "cutlass", "mxfp4", "trtllm")
    },
}
"""Flags of earlier releases of SGLang → their names today, of some switches with a value."""
CHOICES = re.compile(r"invalid choice: '(.{0,200}?)' \((choose from [^()]*)\)$", re.DOTALL)
UNKEPT = (
    "session ids have no effect: agents' prompts are evicted as anybody's; add --enable-session-radix-cache, and leave "
    "--disable-radix-cache out"
)
"""Note on a launch that keeps no session's KV."""


@dataclass(frozen=True, slots=True)
class LaunchVerdict:
    """Whether WHIFLASH would start with a launch, and why not.

    obstacles: by name of a rule or flag, a sentence that says what to do, the start's own first. foreign: names of
    those that are SGLang's own. replaced: a sentence on each flag that WHIFLASH replaces. unread: facts that no rule
    could read, because the recipe does not hold them. notes: what is without effect. command: the launch with WHIFLASH,
    if there is one.
    """

    obstacles: Mapping[str, str]
    replaced: Sequence[str] = ()
    unread: Sequence[str] = ()
    notes: Sequence[str] = ()
    foreign: frozenset[str] = frozenset()
    command: str = ""

    @property
    def starts(self) -> bool:
        return not self.obstacles


@dataclass(slots=True)
class _Read:
    """Flags as SGLang reads them: fields of its arguments, wrong flags with their errors, and unread ones."""

    fields: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    drafters: bool = True


def judge(
    flags: Mapping[str, Flag], environment: Mapping[str, str] | None = None, target: Path | None = None
) -> LaunchVerdict:
    """Judge a launch with these flags, named with or without dashes.

    Args:
        environment: SGLang's variables that the launch sets. target: directory with the target's `config.json`. Without
            it, and if the flags name no such directory, rules about the target's layers are left out.

    Raises:
        ConfigError: SGLang cannot read the target's configuration.
    """
    read = _read(flags)
    replaced = _replace(read.fields)
    named = Path(read.fields.get("model_path", ""))
    with suppress(OSError):  # a name may be longer than any file's
        if target is None and (named / "config.json").is_file():
            target = named
    if target is None:
        model = read.fields.get("model_path") or "TARGET"
        read.unread.append(f"the target's layers, without its config.json: add --model-path {model} to this check")
    own_code = read.fields.pop("trust_remote_code", False)
    try:
        launch, chosen = _launch(read.fields, environment or {}, target)
    except ImportError:
        read.unread.append("the target's layers, which SGLang reads: it is not installed here")
        launch, chosen = _launch(read.fields, environment or {}, None)
    except ConfigError:
        if target is None or not own_code or '"auto_map"' not in read_text(target / "config.json"):
            raise
        read.unread.append("the target's layers, which need its own code: nothing of it is run here")
        launch, chosen = _launch(read.fields, environment or {}, None)
    launch = replace(launch, draft_kv=read.drafters)
    obstacles = read.wrong | dict(refusals_of(launch))
    is_uncaptured, sentence = UNCAPTURED
    if launch.draft_kv and is_uncaptured(launch):
        obstacles["uncaptured"] = sentence.format(launch.architecture)
    keeps = launch.args.enable_session_radix_cache and not launch.args.disable_radix_cache
    notes, foreign = () if keeps else (UNKEPT,), frozenset(read.wrong) - {flag_of(name) for name in Flags.model_fields}
    return LaunchVerdict(obstacles, [*replaced, *chosen], read.unread, notes, foreign)


def _read(flags: Mapping[str, Flag]) -> _Read:
    read, parser = _Read(), parser_of_sglang()
    ours = {flag_of(name): name for name in Flags.model_fields}
    for name, value in flags.items():
        option = option_of(name)
        action = parser.meant(option)
        try:
            if option in ours:
                read.drafters &= parse_flags({ours[option]: value}).drafters != "none"
            elif action is None:
                raise ConfigError(f"{option} is no flag of SGLang {_table()['version']}; {parser.guess(option)}")
            elif is_unknown(value) and action.nargs != 0:
                fields = parser.fields([option, _MORE_THAN_ONE]) if action.type in (int, float) else {}
                read.fields |= fields
                read.unread += [] if fields else [f"{option}, whose value is a variable"]
            else:
                read.fields |= parser.fields(_words(option, value, is_switch=action.nargs == 0))
        except ConfigError as error:
            read.wrong[option] = str(error)
    if config := read.fields.pop("config", None):
        read.unread.append(f"the flags in {config}: whiflash check --recipe {config} judges them")
    return read


def _words(option: str, value: Flag, *, is_switch: bool) -> list[str]:
    """Return the command line's words for a flag; an empty list for a switch that is off."""
    if is_switch and value and is_unknown(value):  # words of a variable behind a switch
        return [option]
    if not isinstance(value, str):
        return [option, *value]
    if not is_switch:
        return [f"{option}={value}"]
    if value.lower() not in ("", "true", "false"):
        raise ConfigError(f"{option} is a switch, not {value!r}; give true, false or no value")
    return [] if value.lower() == "false" else [option]


def option_of(name: str) -> str:
    return "--" + name.lstrip("-").replace("_", "-")


def is_unknown(value: Flag) -> bool:
    """Whether a value is not known, because it is empty or holds a variable."""
    return not value or any("$" in word or "`" in word for word in ([value] if isinstance(value, str) else value))


class Parser(argparse.ArgumentParser):
    """SGLang's argument parser, used to read one flag at a time and return the fields that it sets."""

    def error(self, message: str) -> NoReturn:
        if wrong := CHOICES.search(message):
            near = get_close_matches(wrong[1], re.findall(r"[\w.-]+", wrong[2]), 3)
            message = message[: wrong.start(2)].rstrip(" (") + (f"; did you mean {' or '.join(near)}?" if near else "")
        raise ConfigError(f"SGLang {_table()['version']} does not take it: {message}; give another value")

    def meant(self, option: str) -> argparse.Action | None:
        """Return the flag of this name, or the only flag that begins with it, or None."""
        named = self._option_string_actions
        if option in named:
            return named[option]
        fitting = [action for name, action in named.items() if name.startswith(option)]
        return fitting[0] if len({id(action) for action in fitting}) == 1 else None

    def guess(self, option: str) -> str:
        """Return advice on a flag that SGLang does not have."""
        if new := RENAMED.get(option):
            return f"it is {new} now"
        named = self._option_string_actions
        near = [name for name in named if name.startswith(option)] or get_close_matches(option, named, 1, 0.85)
        return f"did you mean {' or '.join(near)}? Else remove it" if near else "remove it"

    def fields(self, words: list[str]) -> dict[str, Any]:
        return vars(self.parse_args(words, argparse.Namespace()))


@cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = read_json_file(Path(__file__).with_name("flags.json"))
    return table


@cache
def parser_of_sglang() -> Parser:
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for flag in _table()["flags"]:
        kwargs = {key: flag[key] for key in ("dest", "nargs", "choices") if key in flag}
        if "const" in flag:
            kwargs |= {"action": "store_const", "const": flag["const"]}
        elif flag.get("negated"):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs["type"] = TYPES.get(flag.get("type", ""), str)
        parser.add_argument(*flag["names"], **kwargs)
    return parser


def _size(text: str) -> int:
    """Parse a whole number that may end in a unit, such as 2k or 2Ki."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:([kMGT])(i?))?", text.strip())
    if found is None or ("." in found[1] and found[2] is None):
        raise ValueError(text)
    power = "kMGT".index(found[2]) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


TYPES: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "human_readable_int": _size,
    **dict.fromkeys(("loads", "json_list_type", "parse_cuda_graph_config_arg"), read_json),
}
"""Names of SGLang's functions that read values → ours; any other is read as text."""


def _replace(fields: dict[str, Any]) -> list[str]:
    """Take flags of SGLang's other algorithms out of `fields`; return a sentence on each."""
    algorithm = fields.pop("speculative_algorithm", None)
    if algorithm is None or algorithm.upper() == ALGORITHM:
        return []
    drafter = ALGORITHMS.get(algorithm.upper(), "its own arms")
    sentences = [f"--speculative-algorithm {algorithm} is replaced by {ALGORITHM}: {drafter}"]
    for name in FOREIGN:
        if name in fields:
            del fields[name]
            tree = drafter == _EAGLE and name == "speculative_num_draft_tokens"  # the tree's size
            by = None if tree else SETTINGS.get(name)
            change = f"replaced by {by}" if by else "left out: WHIFLASH has no use for it"
            sentences.append(f"--{name.replace('_', '-')} is {change}")
    if "speculative_draft_model_path" in fields:
        stays = "stays: the drafter's format says what it is"
        why = stays if algorithm.upper() in ALGORITHMS else f"is left out: WHIFLASH reads no drafter of {algorithm}"
        sentences.append(f"--speculative-draft-model-path {why}")
    return sentences


def _launch(fields: Mapping[str, Any], environment: Mapping[str, str], target: Path | None) -> tuple[Launch, list[str]]:
    """Return the launch that a start would see (on a GPU if no device is named), a sentence on each replaced flag."""
    arguments = SimpleNamespace(**{**_table()["defaults"], "model_path": str(target), "device": "cuda", **fields})
    device = arguments.device.partition(":")[0]
    replaced = fill_in_for_cuda(arguments, hopper=False) if device == "cuda" else []
    replaced += fill_in(arguments)
    model = None if target is None else _model(arguments, target)
    if arguments.enable_dp_attention and arguments.attn_dp_size == 1:
        arguments.attn_dp_size = arguments.dp_size
    phases = {phase: SimpleNamespace(backend=_graphs(arguments, phase)) for phase in ("decode", "prefill")}
    arguments.cuda_graph_config = SimpleNamespace(**phases)
    return Launch(arguments, fields, model, device, own_platform=True, environment=environment), replaced


def _graphs(arguments: Any, phase: str) -> str:
    """Return the backend of a phase's CUDA graphs: the JSON's, else the phase's flag's, else `disabled` or `full`."""
    off = arguments.disable_cuda_graph or getattr(arguments, f"disable_{phase}_cuda_graph")
    named = getattr(arguments, f"cuda_graph_backend_{phase}") or (DISABLED if off else "full")
    with suppress(AttributeError, KeyError, TypeError):  # not given, or not for this phase
        named = arguments.cuda_graph_config[phase]["backend"]
    return str(named)


def _model(arguments: Any, target: Path) -> Any:
    for _ in tracked((target,), "importing SGLang, which reads the target's configuration"):
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.server_args import ServerArgs

    defaults = _table()["defaults"]
    given = {name: value for name, value in vars(arguments).items() if value != defaults.get(name, value)}
    try:
        return ModelConfig.from_server_args(ServerArgs(**given), model_path=str(target))
    except Exception as error:  # the file may hold anything, and SGLang checks little of it
        raise ConfigError(
            f"SGLang cannot read {target / 'config.json'}: {type(error).__name__}: {' '.join(str(error).split())}; "
            "give another --model-path"
        ) from None
