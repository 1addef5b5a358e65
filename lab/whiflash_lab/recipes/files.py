"""Reads the flags of SGLang servers from launch scripts of a shell, YAML or JSON lines. Imports no SGLang."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.files.disk import MOST_SETTINGS, read_text, yaml_documents

LAUNCH = re.compile(r"(?:sglang\.launch_server|(?:sglang|whiflash)\s+serve)(?=\s|$)")
VLLM = re.compile(r"\bvllm(?: serve|\.entrypoints)\b")
QUOTED = re.compile(r"\"(?:\\.|[^\"\\])*(?:(\")|\\?$)|'[^']*(?:(')|$)")
WORDS = re.compile(r"\s*(?:#[^\n]*|([();<>|&]+)|((?:\\.|\"(?:\\.|[^\"\\])*\"|'[^']*'|[^\s\"'\\();<>|&])+))", re.DOTALL)
"""A comment, an operator (group 1) or a word as written (group 2)."""
MANY = re.compile(r"\$|\"\$([@*]|\{\w+\[)")
"""Start of a word that a shell may divide."""
KEYWORDS = {"do", "then", "else", "if", "elif", "while", "until", "{", "!"}
COMPUTED = re.compile(r"\$\(\(.{0,200}?\)\)|\$\([^()]*\)|`[^`]*`")
KEPT = re.compile(r"\$computed(\d+)_")
ARRAY = re.compile(r"^[ \t]*(\w+)\+?=\(((?:\"(?:\\.|[^\"\\])*\"|'[^']*'|(?<!\S)#[^\n]*|[^()\"'])*+)\)", re.MULTILINE)
OPEN_ARRAY = re.compile(r"=\(((?:\"(?:\\.|[^\"\\])*\"|'[^']*'|(?<!\S)#[^\n]*|[^()\"'])*+)\Z")
REFERENCE = re.compile(r"\"?\$\{(\w+)\[[@*]\]\}\"?")
ASSIGNED = re.compile(
    r"(?:^|[;&|]|\bthen\b|\bdo\b)[ \t]*(?:export[ \t]+|readonly[ \t]+)?(\w+)="
    r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s;&|()\"']*)(?=[ \t]*(?:$|[;&|#]))",
    re.MULTILINE,
)
USED = re.compile(r"'[^']*'|\$(?:(\w+)|\{(\w+)(?::-([^{}$]*))?\})")
VARIABLE = re.compile(r"\b(SGLANG_\w+)=(?![\"']?-)(\S+)")
OF_FLAGS = re.compile(r"^(?:export[ \t]+)?(\w+)=(['\"]?)(--.*)\2$", re.MULTILINE)
"""A variable that holds flags, as in an environment file."""
HEREDOC = re.compile(r"(?<!<)<<-?[ \t]*(['\"\\]?)([A-Za-z_]\w*)")
ESCAPED = re.compile(r"\\([\\$`])")
MOST_RECIPES, MOST_LINE, DEEPEST_ARRAY = 1000, 1 << 16, 16
"""Most launches of a file; most characters of one after its arrays are filled in; deepest nesting of arrays."""
ROLES = "sglang_config"
"""Key of srt-slurm's recipes: a mapping of flags for each role, `prefill`, `decode` or `aggregated`."""
KEYS = (("command", "args"), ("entrypoint", "command"))
"""Keys of a container's first and further words, in Kubernetes and in compose files."""


class Word(str):
    """A word's value, with its text in the shell that it was read from."""

    source: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """One launch. flags: name → value as text or a list of words, which may hold variables; empty for a switch.
    environment: SGLang's variables that the launch sets. start: the words before its flags, empty if there are flags
    only. keys: those of a container's mapping for `start` and for the flags, empty if its shell starts the server."""

    name: str
    flags: Mapping[str, str | Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    start: str = ""
    keys: tuple[str, ...] | None = None


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
        what = "launches vLLM" if VLLM.search(text) else "holds no launch that can be read"
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
                yield from _containers(document, path)
            else:
                yield Recipe(str(path), _flags(document, path))
            continue
        for role, flags in backend[ROLES].items():
            variables = backend.get(f"{role}_environment")
            yield Recipe(f"{path}: {role}", _flags(flags, path), _environment(variables, path))


def _containers(document: Any, path: Path, name: str = "") -> Iterator[Recipe]:
    """Yield the launches of a compose or Kubernetes file: those of each mapping with words to run in a container."""
    if isinstance(document, list):
        for each in document:
            yield from _containers(each, path, name)
    if not isinstance(document, dict):
        return
    for first, further in KEYS:
        words = [_words_of(document.get(key)) for key in (first, further)]
        every = [word for key in words for word in key]
        who = f"{path}: {document.get('name', document.get('container_name', name))}".rstrip(": ")
        if script := next((word for word in every if LAUNCH.search(word) and " " in word), None):
            for recipe in _shell(script, path, who):
                yield replace(recipe, keys=(), environment={**_of_container(document), **recipe.environment})
            return
        at = next((at for at, word in enumerate(every) if LAUNCH.search(" ".join(every[: at + 1]))), None)
        if at is not None:
            flags = _flags_in(every[at + 1 :])
            keys = (first, further) if words[1] else (first, first) if words[0] else (further, further)
            yield Recipe(who, flags, _of_container(document), shlex.join(every[: at + 1]), keys)
            return
        if every and every[0].startswith("--model") and "sglang" in str(document.get("image")):
            raise UsageError(f"--recipe {who} has no command: add the one of its image, such as [sglang, serve]")
    for key, value in document.items():
        yield from _containers(value, path, str(key))


def _words_of(value: Any) -> list[str]:
    words = shlex.split(value) if isinstance(value, str) else value
    return [str(word) for word in words] if isinstance(words, list) else []


def _of_container(document: Mapping[str, Any]) -> dict[str, str]:
    """Return SGLang's variables of a container: a mapping, a list of names and values, or one of NAME=VALUE."""
    listed = document.get("env", document.get("environment")) or {}
    if not isinstance(listed, dict):
        listed = listed if isinstance(listed, list) else [listed]
        named = [
            one if isinstance(one, dict) else dict(zip(("name", "value"), str(one).split("=", 1), strict=False))
            for one in listed
        ]
        listed = {one.get("name"): one.get("value", "$") for one in named}
    return {str(name): str(value) for name, value in listed.items() if str(name).startswith("SGLANG_")}


def _backend(document: Any) -> dict[str, Any] | None:
    """Return the first mapping in `document` that has the key `ROLES` of srt-slurm's recipes; None without one."""
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
    return {str(name): str(value) for name, value in _mapping({} if document is None else document, path).items()}


def _flags(document: Any, path: Path) -> dict[str, str | list[str]]:
    return {str(name): _text(value) for name, value in _mapping(document, path).items()}


def _text(value: Any) -> str | list[str]:
    if isinstance(value, list):
        return [str(word) for word in value]
    if isinstance(value, bool | dict):
        return json.dumps(value, default=str)
    return "" if value is None else str(value)


def _shell(text: str, path: Path, who: str = "") -> Iterator[Recipe]:
    """Yield the flags of each server that a shell script launches. A text without a launch is flags only, or has
    variables that hold flags. Arrays get all words that they may hold, and variables the only value that is assigned
    to them before, else their default. who: name of the container whose script this is; its variables stay.
    """
    before, begins, after = f"\n{text}".partition("\napiVersion:")
    if begins and (opened_by := HEREDOC.findall(before)):  # as in `kubectl apply -f - <<EOF`
        yield from _yaml(begins + after.split(f"\n{opened_by[-1][1]}\n")[0], path)
        return
    text = _as_written(re.sub(r"^[ \t]*#.*\n", "", text, flags=re.MULTILINE)).replace("\\\n", " ")
    computed = [found[0] for found in COMPUTED.finditer(text)]
    numbers = count()
    text = COMPUTED.sub(lambda _: f"$computed{next(numbers)}_", text)
    arrays: dict[str, str] = {}
    for name, words in ARRAY.findall(text):
        arrays[name] = f"{arrays.get(name, '')} {words}"
    launches = list(islice(LAUNCH.finditer(text), MOST_RECIPES + 1))
    if not launches and text.lstrip().startswith("-"):
        yield Recipe(str(path), _of_words(text.replace("\n", " "), arrays, {}, computed, path))
    for name, _, line in [] if launches else OF_FLAGS.findall(text):
        yield Recipe(f"{path}: {name}", _of_words(line, arrays, {}, computed, path), _variables_in(text))
    for number, launch in enumerate(launches, 1):
        before, rest = text[: launch.start()], text[launch.end() :]
        in_array = OPEN_ARRAY.search(before)
        line = rest.split("\n)" if in_array else "\n", 1)[0]
        variables = None if who else _assigned(before)
        start = _filled(before.rpartition("\n")[2], variables)
        outer: list[str] = []
        if opened := next((q for q in QUOTED.finditer(start) if not (q[1] or q[2])), None):
            outer, start = _last_command(start[: opened.start()]), opened[0][1:]  # as in `bash -c "…"`
            if opened[0][0] == "'":
                line = line.partition("'")[0]
            else:
                inner = re.match(r"(?:\\.|[^\"\\])*", line)
                start, line = (re.sub(r"\\([\"\\$`])", r"\1", part) for part in (start, inner[0] if inner else ""))
        words = _last_command(start)
        if {*outer[:1], *words[:1]} & {"echo", "printf"}:
            continue  # as in `echo "Usage: sglang serve MODEL"`
        flags = _of_words(line, arrays, variables, computed, path)
        name = (who or str(path)) + (f": {number}" if len(launches) > 1 else "")
        path_of_it = words.pop() if words and not before[-1:].isspace() else ""
        command = " ".join([*words, path_of_it + " ".join(launch[0].split())])
        keys = () if "docker" in outer else None
        yield Recipe(name, flags, _variables_in(before), _restored(command, computed), keys)


def _as_written(text: str) -> str:
    """Return the text with its here-documents as a shell writes them."""
    lines, end = [], ""
    for line in text.splitlines(keepends=True):
        lines.append(ESCAPED.sub(r"\1", line) if end else line)
        if line.strip() == end:
            end = ""
        elif not end and (opened := HEREDOC.search(line)) and not opened[1]:
            end = opened[2]
    return "".join(lines)


def _variables_in(text: str) -> dict[str, str]:
    """Return SGLang's variables that a script sets, but for those that hold flags."""
    return {name: value.strip("\"'") for name, value in VARIABLE.findall(text)}


def _last_command(text: str) -> list[str]:
    """Return the words, as written, after the last operator or keyword of a shell's line."""
    words: list[str] = []
    for found in WORDS.finditer(text):
        word = found[2] or ""
        if found[1]:
            words = []
        elif word and (words or word not in KEYWORDS):
            words.append(word.removeprefix("ExecStart="))
    return words


def _assigned(text: str) -> dict[str, str]:
    """Return the value of each variable that a script's text gives one value only."""
    values: dict[str, set[str]] = {}
    for name, value in ASSIGNED.findall(text):
        value = value[1:-1] if value[:1] in ("'", '"') else value
        own = USED.fullmatch(value)  # such as PORT=${PORT:-30000}
        values.setdefault(name, set()).add(own[3] or value if own and own[2] == name else value)
    return {name: found.pop() for name, found in values.items() if len(found) == 1}


def _filled(line: str, variables: Mapping[str, str] | None) -> str:
    """Return a line with the variables' values in their places; others stay, or take their default. None: all stay."""
    for _ in range(DEEPEST_ARRAY):
        if variables is None or len(line) > MOST_LINE or not USED.search(line):
            return line
        line = USED.sub(lambda found: variables.get(found[1] or found[2], found[3] or found[0]), line)
    return line


def _restored(text: str, computed: Sequence[str]) -> str:
    return KEPT.sub(lambda found: computed[int(found[1])], text)


def _of_words(
    line: str, arrays: Mapping[str, str], variables: Mapping[str, str] | None, computed: Sequence[str], path: Path
) -> dict[str, str | list[str]]:
    for _ in range(DEEPEST_ARRAY):
        filled = len(line) + sum(len(arrays.get(name, " ")) for name in REFERENCE.findall(line))
        if filled > MOST_LINE:
            raise UsageError(f"--recipe {path}: a launch of more than {MOST_LINE} characters is not read")
        line = REFERENCE.sub(lambda reference: arrays.get(reference[1], reference[0]), line)
    line = re.sub(r"(?<=\s)\d+(?=[<>])", "", _filled(line, variables))  # the 2 of 2>&1
    words, place, line = [], 0, line.strip()
    while place < len(line) and not ((found := WORDS.match(line, place)) and found[1]):
        if found is None:
            raise UsageError(f"--recipe {path} is not a shell line: No closing quotation")
        place = found.end()
        if found[2]:
            words.append(word := Word(_restored(shlex.split(found[2])[0], computed)))
            word.source = _restored(found[2], computed)
    if words and MANY.match(words[0].source):
        raise UsageError(f"--recipe {path}: {words[0]} is not read, since it may hold any flags: write its words there")
    return _flags_in(words)


def _flags_in(words: Iterable[str]) -> dict[str, str | list[str]]:
    flags: dict[str, list[str]] = {}
    name = "model-path"
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, joined, value = word[2:].partition("=")
            flags[name] = [value] if joined else []
            if joined and isinstance(word, Word):
                quote = word.source[0] if word.source[0] in "\"'" else ""
                flags[name] = [value := Word(value)]
                value.source = quote + word.source.partition("=")[2]
        else:  # the model is named first
            flags.setdefault(name, []).append(word)
    return {name: values[0] if len(values) == 1 else values or "" for name, values in flags.items()}
