"""Rewrites a launch for WHIFLASH: the new command, and as comments what it leaves out of the old one."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from whiflash_lab.published import known
from whiflash_lab.recipes.files import MANY, Recipe, Word
from whiflash_lab.recipes.judge import RENAMED, Flag, LaunchVerdict, is_unknown, judge, option_of, parser_of_sglang
from whiflash_sglang.engine.carried import ALGORITHM

ALGORITHM_FLAG, DRAFT = "--speculative-algorithm", "--speculative-draft-model-path"
NO_DRAFTERS, FLAG = "--whiflash-drafters", re.compile(r"--[a-z0-9-]+")


def judged(recipe: Recipe, target: Path | None = None) -> LaunchVerdict:
    """Judge a launch, and write the command with which it starts under WHIFLASH, if removing flags leads to one.

    Raises:
        ConfigError: SGLang cannot read the target's configuration.
    """
    own = {name: _parted(name, value) for name, value in recipe.flags.items()}
    recipe = replace(recipe, flags={name: value for name, (value, _) in own.items()})
    further = [word for _, more in own.values() for word in more]
    verdict = judge(recipe.flags, recipe.environment, target)
    models = {"model_path", "config"} & {_field(option_of(name)) for name in recipe.flags}
    if recipe.start and not models and not recipe.start.endswith("whiflash serve"):  # which has a model of its own
        no_model = "the launch names no model that could be read: add --model-path"
        return replace(verdict, obstacles={"model": no_model, **verdict.obstacles})
    flags: Mapping[str, Flag] = {option_of(name): value for name, value in recipe.flags.items()}
    environment, comments = dict(recipe.environment), list(verdict.replaced)
    for sentence in verdict.replaced:
        if not sentence.startswith(f"{DRAFT} stays"):
            flags = _without(flags, sentence.split()[0])
    for old in [name for name in flags if name in RENAMED]:
        comments.append(f"{old} is {RENAMED[old]} now")
        flags = _renamed(flags, old)
    flags = {**_without(flags, ALGORITHM_FLAG), ALGORITHM_FLAG: ALGORITHM}
    now = judge(flags, environment, target)
    while not now.starts:
        name, sentence = next(iter(now.obstacles.items()))
        fewer = _remedied(flags, name, sentence)
        left = {key: value for key, value in environment.items() if key not in sentence}
        if (fewer, left) == (flags, environment):
            return verdict
        comments.append(f"changed: {sentence}")
        flags, environment = fewer, left
        now = judge(flags, environment, target)
    computed = [name for name, value in environment.items() if {"$", "`"} & {*value} and f"{name}=" not in recipe.start]
    given = {name: environment[name] for name in environment if name not in computed}
    lines = list(_command(recipe, flags, given, further))
    names = re.findall(r"\$\{?([A-Za-z_]\w*)", re.sub("'[^']*'", "", "".join(lines)))
    if names := list(dict.fromkeys([*([] if recipe.keys else computed), *names])):
        comments.append(f"set before, as in your file: {', '.join(names)}")
    unread = [*now.unread, *(f"the flags in {word}" for word in further)]
    comments += [*_advice(recipe, flags), *(f"not judged: {what}" for what in unread), *now.notes]
    lines += (f"# {' '.join(comment.split())}" for comment in comments)
    return replace(verdict, command="\n".join(lines))


def _parted(name: str, value: Flag) -> tuple[Flag, list[str]]:
    """Return a flag's own value, and the words of variables behind it, which a shell may make further flags of."""
    words = [value] if isinstance(value, str) else [*value]
    today, _, added = RENAMED.get(option_of(name), option_of(name)).partition(" ")  # a switch has a value now
    own = {0: 0, None: 1}.get(0 if added else getattr(parser_of_sglang().meant(today), "nargs", None), len(words))
    more = [word for word in words[own:] if MANY.match(word.source if isinstance(word, Word) else word)]
    return (words[0] if own else "", more) if more and len(more) == len(words) - own else (value, [])


def _remedied(flags: Mapping[str, Flag], name: str, sentence: str) -> Mapping[str, Flag]:
    """Return the flags without one: the obstacle's own, else one that its `sentence` says to remove. If neither is
    given, add the flag for no drafters if the sentence names that, or return the same flags."""
    remedy = sentence.rpartition(";")[2]
    if re.search("serve without|without WHIFLASH|give another value", remedy):
        return flags
    for option in (option_of(name), *FLAG.findall(remedy), *FLAG.findall(sentence)[:1]):
        if len(fewer := _without(flags, option)) < len(flags):
            return fewer
    return {**flags, NO_DRAFTERS: "none"} if f"{NO_DRAFTERS} none" in sentence else flags


def _renamed(flags: Mapping[str, Flag], old: str) -> dict[str, Flag]:
    """Return the flags with one of an earlier release under its name of today; a switch may have a value now."""
    new, _, value = RENAMED[old].partition(" ")
    if value and flags[old] == "false":
        return _without(flags, old)
    size = next((size for name, size in flags.items() if _field(name) == "tp_size"), "1")
    meant = (size if value == "<tp-size>" else value) or flags[old]
    return {new if name == old else name: meant if name == old else given for name, given in flags.items()}


def _field(option: str) -> str:
    action = parser_of_sglang().meant(option)
    return option if action is None else action.dest


def _without(flags: Mapping[str, Flag], option: str) -> dict[str, Flag]:
    """Return the flags without this one, and without aliases and abbreviations that SGLang reads as it."""
    return {name: value for name, value in flags.items() if _field(name) != _field(option)}


def _advice(recipe: Recipe, flags: Mapping[str, Flag]) -> Iterator[str]:
    """Yield what changes with WHIFLASH, and published drafters if the launch names none."""
    named = flags.get("--model-path", flags.get("--model", ""))
    fields = {_field(option_of(name)) for name in recipe.flags}
    if not flags.keys() & {DRAFT, NO_DRAFTERS} and "config" not in fields:
        target = known(named) if isinstance(named, str) else None
        pair = [] if target is None else [("--eagle3", target.eagle3), ("--dflash", target.block)]
        parts = " ".join(f"{flag} {names[0]}" for flag, names in pair if names)
        yield "without a drafter it copies and drafts forced text" + (
            f"; published: whiflash bundle create --target {named} {parts} --out pair; then add {DRAFT} pair"
            if parts
            else f"; add {DRAFT} with a drafter made for exactly this model"
        )
    if not fields & {"speculative_algorithm", "max_running_requests", "config"}:
        yield "at most 48 requests at a time on each replica now; --max-running-requests sets another bound"
    if isinstance(draft := flags.get(DRAFT), str) and named:
        yield f"drafters take memory: whiflash check --model-path {named} --draft {draft} says how much"
    if recipe.keys == ():
        yield "this takes the place of the launch in the container's script"
    if recipe.keys is not None or "docker" in recipe.start:
        yield "the image must hold WhiFlash: deploy/container/sglang.Containerfile adds it to SGLang's"


def _command(
    recipe: Recipe, flags: Mapping[str, Flag], environment: Mapping[str, str], more: Sequence[str]
) -> Iterator[str]:
    """Yield the command's lines in the recipe's form, for a shell or a container. more: words behind its flags."""
    words = [line for name, value in flags.items() if (line := _words(name, value))]
    at = next((at for at, line in enumerate(words) if line[0] == ALGORITHM_FLAG), len(words))
    words[at:at] = filter(None, [[*more]])  # SGLang takes the last algorithm
    gone = recipe.environment.keys() - environment.keys()
    if recipe.keys:
        first, further = recipe.keys
        keys: dict[str, list[str]] = {first: shlex.split(recipe.start)}
        keys.setdefault(further, []).extend(word for line in words for word in line)
        yield from (f"{key}: {json.dumps(value)}" for key, value in keys.items())
        return
    start = recipe.start or "sglang serve"
    start = re.sub(r"(?:(?:-e|--env)[ =]+)?[\"']?\b(\w+)=\S*\s*", lambda at: "" if at[1] in gone else at[0], start)
    # A word from a shell is written as it was there.
    lines = [" ".join(w.source if isinstance(w, Word) else shlex.quote(w) for w in line) for line in words]
    if recipe.keys is not None:  # YAML would read a line's last backslash by rules of its own
        yield " ".join([start, *lines])
        return
    set_before = [f"{name}={shlex.quote(value)}" for name, value in environment.items() if f"{name}=" not in start]
    yield " \\\n    ".join([" ".join([*set_before, start]), *lines])


def _words(name: str, value: Flag) -> list[str]:
    """Return a flag's words; none for a switch that is off."""
    action = parser_of_sglang().meant(name)
    if action is not None and action.nargs == 0 and not is_unknown(value):
        return [] if value == "false" else [name]
    return [name, *([value] if isinstance(value, str) else value)] if value else [name]
