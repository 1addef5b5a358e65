"""Reads the flags of SGLang servers from launch scripts of a shell, YAML or JSON lines. Imports no SGLang."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.files.disk import MOST_SETTINGS, read_text, yaml_documents

LAUNCH = re.compile(r"(?:sglang\.launch_server|(?:sglang|whiflash)\s+serve)(?=\s|$)")
VLLM = re.compile(r"\bvllm(?: serve|\.entrypoints)\b")
QUOTED = re.compile(r"\"(?:\\.|[^\"\\])*(?:(\")|\\?$)|'[^']*(?:(')|$)")
COMPUTED = re.compile(r"\$\(\(.{0,200}?\)\)|\$\([^()]*\)")
ARRAY = re.compile(r"^[ \t]*(\w+)\+?=\(([^()]*)\)", re.MULTILINE)
OPEN_ARRAY = re.compile(r"=\([^()]*$")
REFERENCE = re.compile(r"\"?\$\{(\w+)\[[@*]\]\}\"?")
VARIABLE = re.compile(r"\b(SGLANG_\w+)=(\S+)")
MOST_RECIPES, MOST_LINE, DEEPEST_ARRAY = 1000, 1 << 16, 16
"""Most launches of a file; most characters of one after its arrays are filled in; deepest nesting of arrays."""
ROLES = "sglang_config"
"""Key of srt-slurm's recipes: a mapping of flags for each role, `prefill`, `decode` or `aggregated`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One launch. flags: name → value as text or a list of words; empty for a switch, and if a shell variable has the
    value. environment: SGLang's variables that the launch sets."""

    name: str
    flags: Mapping[str, str | Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)


def read(path: Path) -> list[Recipe]:
    """Read the launches of a file, by its ending: `.yaml` or `.yml`, `.json` or `.jsonl`, else a shell script.

    Raises:
        UsageError: the file is none of these, or has no launch in it.
    """
    readers = {".yaml": _yaml, ".yml": _yaml, ".json": _json, ".jsonl": _json}
    try:
        text = read_text(path, MOST_SETTINGS)
        recipes = list(islice(readers.get(path.suffix.lower(), _shell)(text, path), MOST_RECIPES + 1))
    except ConfigError as error:
        raise error if isinstance(error, UsageError) else UsageError(f"--recipe {error}") from None
    except (RecursionError, ValueError) as error:  # nested deeply, or a number of thousands of digits
        raise UsageError(f"--recipe {path} cannot be read ({error}): flags are names and short values") from None
    if len(recipes) > MOST_RECIPES:
        raise UsageError(f"--recipe {path} has more than {MOST_RECIPES} launches: divide it")
    if not recipes or (path.suffix.lower() in readers and not all(recipe.flags for recipe in recipes)):
        what = "launches vLLM" if VLLM.search(text) else "has no flags"
        raise UsageError(f"--recipe {path} {what}: give a launch such as `sglang serve MODEL --tp-size 2`")
    return recipes


def _yaml(text: str, path: Path) -> Iterator[Recipe]:
    try:
        documents = yaml_documents(text)
    except ValueError as error:
        raise UsageError(f"--recipe {path} is not YAML: {error}") from None
    for document in documents:
        if document is None:
            continue
        backend = _backend(_mapping(document, path))
        if backend is None:
            if document.keys() & {"services", "apiVersion"}:
                raise UsageError(f"--recipe {path} is a compose or Kubernetes file: give its command as a shell line")
            yield Recipe(str(path), _flags(document, path))
            continue
        for role, flags in backend[ROLES].items():
            variables = backend.get(f"{role}_environment")
            yield Recipe(f"{path}: {role}", _flags(flags, path), _environment(variables, path))


def _backend(document: Any) -> dict[str, Any] | None:
    """Return the first mapping in `document` with flags by role (key `ROLES`), or None. Overrides are not read."""
    if not isinstance(document, dict):
        return None
    if isinstance(document.get(ROLES), dict):
        return document
    return next((inner for value in document.values() if (inner := _backend(value))), None)


def _json(text: str, path: Path) -> Iterator[Recipe]:
    """Read JSON objects, one after another: flags, or `flags` with optional `recipe` and `environment`."""
    decoder, text, place = json.JSONDecoder(), text.rstrip(), 0
    while place < len(text):
        place = next(at for at in range(place, len(text)) if not text[at].isspace())
        try:
            document, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise UsageError(f"--recipe {path} is not JSON: {error}") from None
        name = str(_mapping(document, path).get("recipe", path))
        flags = _flags(document.get("flags", document), path)
        yield Recipe(name, flags, _environment(document.get("environment"), path))


def _mapping(document: Any, path: Path) -> dict[Any, Any]:
    if not isinstance(document, dict):
        raise UsageError(f"--recipe {path}: flags and values expected, such as tp-size: 2, not {document!r:.60}")
    return document


def _environment(document: Any, path: Path) -> dict[str, str]:
    variables = {} if document is None else _mapping(document, path)
    return {str(name): str(value) for name, value in variables.items()}


def _flags(document: Any, path: Path) -> dict[str, str | list[str]]:
    return {str(name): _text(value) for name, value in _mapping(document, path).items()}


def _text(value: Any) -> str | list[str]:
    if isinstance(value, list):
        return [str(word) for word in value]
    if isinstance(value, bool | dict):
        return json.dumps(value, default=str)
    return "" if value is None else str(value)


def _shell(text: str, path: Path) -> Iterator[Recipe]:
    """Yield the flags of each server that a shell script launches; a text without a launch is flags only. Arrays get
    all words that they may hold.
    """
    text = re.sub(r"^[ \t]*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    text = COMPUTED.sub("$computed", text)
    arrays: dict[str, str] = {}
    for name, words in ARRAY.findall(text):
        arrays[name] = f"{arrays.get(name, '')} {words}"
    launches = list(islice(LAUNCH.finditer(text), MOST_RECIPES + 1))
    if not launches and text.lstrip().startswith("-"):
        yield Recipe(str(path), _of_words(text.replace("\n", " "), arrays, path))
    for number, launch in enumerate(launches, 1):
        before, rest = text[: launch.start()], text[launch.end() :]
        line = rest.split("\n)" if OPEN_ARRAY.search(before) else "\n", 1)[0]
        quotes = QUOTED.finditer(before.rpartition("\n")[2])
        if opened := next((q for q in quotes if not (q[1] or q[2])), None):
            line = line.partition(opened[0][0])[0]  # the launch is quoted, as in `bash -c "…"`
        name = str(path) if len(launches) == 1 else f"{path}: {number}"
        environment = {key: value.strip("\"'") for key, value in VARIABLE.findall(before)}
        yield Recipe(name, _of_words(line, arrays, path), environment)


def _of_words(line: str, arrays: Mapping[str, str], path: Path) -> dict[str, str | list[str]]:
    for _ in range(DEEPEST_ARRAY):
        filled = len(line) + sum(len(arrays.get(name, " ")) for name in REFERENCE.findall(line))
        if filled > MOST_LINE:
            raise UsageError(f"--recipe {path}: a launch of more than {MOST_LINE} characters is not read")
        line = REFERENCE.sub(lambda reference: arrays.get(reference[1], " "), line)
    line = re.sub(r"(?<=\s)\d+(?=[<>])", "", line)  # the 2 of 2>&1
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    flags: dict[str, list[str]] = {}
    name = "model-path"
    try:
        for word in lexer:
            if set(word) <= set("();<>|&"):
                break
            if word.startswith("--") and len(word) > 2:
                name, joined, value = word[2:].partition("=")
                flags[name] = [value] if joined else []
            elif name not in flags:  # the model, named first
                flags[name] = [word]
            else:
                flags[name].append(word)
    except ValueError as error:
        raise UsageError(f"--recipe {path} is not a shell line: {error}") from None
    return {name: _value(words) for name, words in flags.items()}


def _value(words: list[str]) -> str | list[str]:
    if not words or any("$" in word or "`" in word for word in words):
        return ""
    return words[0] if len(words) == 1 else words
