"""Judges a launch by its flags, without weights or a GPU, and if need be without the target's configuration.

The rules are those of a start (:mod:`whiflash_sglang.engine.launch.refusals`), and SGLang's own parser reads the
flags. Flags of SGLang's other algorithms count as replaced by WHIFLASH.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.arg_groups.parallel_hook import handle_deprecated_dp_attention
from sglang.srt.server_args import ServerArgs

from whiflash_sglang.engine.carried import ALGORITHM
from whiflash_sglang.engine.launch.arguments import Launch, choose, choose_for_cuda
from whiflash_sglang.engine.launch.refusals import FOREIGN, UNCAPTURED, refusals_of
from whiflash_sglang.engine.supported import installed
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import read_text
from whiflash_sglang.settings.config import Flags, flag_of, parse_flags

Flag = str | Sequence[str]
"""A flag's value: `true` or `false` for a switch, words for a list. Empty: a switch that is on, or a variable's value,
which may be several words."""
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
UNKEPT = (
    "session ids have no effect: agents' prompts are evicted as anybody's; add --enable-session-radix-cache, and leave "
    "--disable-radix-cache out"
)
"""Note on a launch that keeps no session's KV."""


@dataclass(frozen=True, slots=True)
class LaunchVerdict:
    """Whether WHIFLASH would start with a launch, and why not.

    obstacles: by name of a rule or flag, a sentence that says what to do, the start's own first. without_drafters:
    obstacles if no drafter keeps KV. replaced: a sentence on each flag that WHIFLASH replaces. unread: facts that no
    rule could read, because the recipe does not hold them. notes: what is without effect.
    """

    obstacles: Mapping[str, str]
    without_drafters: Mapping[str, str]
    replaced: Sequence[str] = ()
    unread: Sequence[str] = ()
    notes: Sequence[str] = ()

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
        read.unread.append(f"the target's layers, without its config.json: add --model-path {model}")
    own_code = read.fields.pop("trust_remote_code", False)
    try:
        launch, chosen = _launch(read.fields, environment or {}, target)
    except ConfigError:
        if target is None or not own_code or '"auto_map"' not in read_text(target / "config.json"):
            raise
        read.unread.append("the target's layers, which need its own code: nothing of it is run here")
        launch, chosen = _launch(read.fields, environment or {}, None)
    launch = replace(launch, draft_kv=read.drafters)
    obstacles = read.wrong | _obstacles(launch)
    without = read.wrong | _obstacles(replace(launch, draft_kv=False))
    keeps = launch.args.enable_session_radix_cache and not launch.args.disable_radix_cache
    return LaunchVerdict(obstacles, without, [*replaced, *chosen], read.unread, () if keeps else (UNKEPT,))


def _obstacles(launch: Launch) -> dict[str, str]:
    obstacles = dict(refusals_of(launch))
    if launch.draft_kv and UNCAPTURED.found(launch):
        obstacles["uncaptured"] = UNCAPTURED.sentence.format(launch.architecture)
    return obstacles


def _read(flags: Mapping[str, Flag]) -> _Read:
    read, parser = _Read(), _parser()
    ours = {flag_of(name): name for name in Flags.model_fields}
    for name, value in flags.items():
        option = "--" + name.lstrip("-").replace("_", "-")
        action = parser.meant(option)
        try:
            if option in ours:
                read.drafters &= parse_flags({ours[option]: value}).drafters != "none"
            elif action is None:
                raise ConfigError(f"{option} is no flag of SGLang {installed()}; remove it, or give its new name")
            elif value == "" and action.nargs != 0:
                fields = parser.fields([option, _MORE_THAN_ONE]) if action.type in (int, float) else {}
                read.fields |= fields
                read.unread += [] if fields else [f"{option}, whose value is a variable"]
            else:
                read.fields |= parser.fields(_words(option, value, is_switch=action.nargs == 0))
        except ConfigError as error:
            read.wrong[option] = str(error)
    if read.fields.pop("config", None):
        read.unread.append("the file of --config")
    return read


def _words(option: str, value: Flag, *, is_switch: bool) -> list[str]:
    """Return the command line's words for a flag; an empty list for a switch that is off."""
    if not isinstance(value, str):
        return [option, *value]
    if not is_switch:
        return [f"{option}={value}"]
    if value.lower() not in ("", "true", "false"):
        raise ConfigError(f"{option} is a switch, not {value!r}; give true, false or no value")
    return [] if value.lower() == "false" else [option]


class _Parser(argparse.ArgumentParser):
    """SGLang's argument parser, used to read one flag at a time and return the fields that it sets."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"SGLang {installed()} does not take it: {message}; give another value")

    def meant(self, option: str) -> argparse.Action | None:
        """Return the flag of this name, or the only flag that begins with it, or None."""
        named = self._option_string_actions
        if option in named:
            return named[option]
        fitting = [action for name, action in named.items() if name.startswith(option)]
        return fitting[0] if len({id(action) for action in fitting}) == 1 else None

    def fields(self, words: list[str]) -> dict[str, Any]:
        try:
            return vars(self.parse_args(words, argparse.Namespace()))
        except AssertionError as error:  # some of SGLang's flags check values by assert
            self.error(str(error))


@cache
def _parser() -> _Parser:
    # Old names still count as flags, so SGLang's warnings about their removal are hidden.
    logging.getLogger("sglang.srt.arg_groups.argparse_actions").setLevel(logging.ERROR)
    parser = _Parser(add_help=False)
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return parser


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
    if "speculative_draft_model_path" in fields and algorithm.upper() in ALGORITHMS:
        sentences.append("--speculative-draft-model-path stays: the drafter's format says what it is")
    return sentences


def _launch(fields: Mapping[str, Any], environment: Mapping[str, str], target: Path | None) -> tuple[Launch, list[str]]:
    """Return the launch that a start would see (on a GPU if no device is named), a sentence on each replaced flag."""
    arguments = ServerArgs(**{"model_path": str(target), "device": "cuda", **fields})
    device = arguments.device.partition(":")[0]
    replaced = choose_for_cuda(arguments) if device == "cuda" else []
    choose(arguments)
    handle_deprecated_dp_attention(arguments)
    parse_cuda_graph_config(arguments)
    model = None if target is None else _model(arguments, target)
    view = resolving_view(arguments)
    return Launch(view, fields, model, device, own_platform=True, environment=environment), replaced


def _model(arguments: Any, target: Path) -> Any:
    # Imported here because it brings transformers and all of SGLang's models, for recipes with a local target only.
    from sglang.srt.configs.model_config import ModelConfig

    try:
        return ModelConfig.from_server_args(arguments, model_path=str(target))
    except Exception as error:  # the file may hold anything, and SGLang checks little of it
        raise ConfigError(
            f"SGLang cannot read {target / 'config.json'}: {type(error).__name__}: {' '.join(str(error).split())}; "
            "give another --model-path"
        ) from None
