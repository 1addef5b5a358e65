"""Reads the flags of SGLang servers from launch scripts of a shell, YAML or JSON lines. Imports no SGLang."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import dropwhile, islice, pairwise
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.files.disk import MOST_SETTINGS, read_text, yaml_documents

SERVER = re.compile(r"-m sglang\.launch_server|(?:.*/)?(?:sglang|whiflash) serve")
LAUNCH = re.compile(r"(?:sglang\.launch_server|(?:sglang|whiflash)\s+serve)(?=\s|$)")
VLLM = re.compile(r"\bvllm(?: serve|\.entrypoints)\b")
OPERATOR = re.compile(
    r"(?:[^\S\n]|\\\n)*(?:((?:\d+|&)?(?:>[>|&]?|<[<>&]*-?)(?!\()[^\S\n]*)|(?:#[^\n]*)?(\n|(?:[;&|)]|\(\)|\{(?=\s))+|\Z))?"
)
"""Blanks, then a redirection (group 1), or a comment and what ends a command (group 2)."""
MARK = re.compile(
    r"((?:[$<>]|(?<==))\(|\$\{|[\"`])|<<-?(?=[ \t]*[\"'\\]?([A-Za-z_]\w*+)[^\n)<]*+\n)|([\s();&|<>])|\\.|(?<!\S)#|['}]",
    re.DOTALL,
)
"""Marks in a shell's word that open a part of it (group 1), begin a here-document (its name is group 2), end the word
(group 3), or mean something else."""
MANY = re.compile(r"\$|\"\$([@*]|\{\w+\[)")
"""Start of a word that a shell may divide."""
KEYWORDS = {"do", "then", "else", "if", "elif", "while", "until", "!"}
SETTING, UNSETTING = {"", "export", "readonly", "declare", "local", "alias"}, {"unset", "for", "select", "read"}
SAYING = re.compile(r"echo|printf|print|log|logger|info|warn|error|die|pkill|pgrep|killall|e?grep|sed|awk|curl|git")
"""Commands that name a launch, and start none."""
STARTING = re.compile(
    r"sglang|whiflash|python[\d.]*|nohup|exec|eval|env|numactl|taskset|sudo|srun|docker|podman|ssh|tmux|uv|(?:ba|z)?sh"
)
"""Commands that start the command in their words."""
READING = re.compile(r"\b(?:(?:ba|z)?sh|ssh|sbatch|tee|kubectl|docker|podman)\b|>(?!&|\s*/dev/)")
"""Words of a line with a here-document that run it, or write it to a file."""
ASSIGNED = re.compile(r"(?:Environment=)?(\w+)(\+?)=")
USED = re.compile(r"'[^']*'|(\"?)\$(?:(\w+)|\{(\w+)(?:(\[[@*]\])|:?[-=]([^{}$]*))?\})\1")
UNSAFE = re.compile(r"[\"'\\;&|<>()#\n`]")
VARIABLE = re.compile(r"\b(SGLANG_\w+)=(.*)", re.DOTALL)
OF_FLAGS = re.compile(r"^(?:export[ \t]+)?(\w+)=(['\"]?)(--.*)\2$", re.MULTILINE)
"""A variable that holds flags, as in an environment file."""
MANIFEST = re.compile(r"^(?:apiVersion|services):", re.MULTILINE)
ESCAPED = re.compile(r"\\([\\$`])")
MOST_RECIPES, MOST_LINE, MOST_VALUE, DEEPEST = 1000, 1 << 16, 1 << 13, 16
"""Most launches of a file, characters of one, and characters of a value that is filled in; deepest command in words."""
ROLES = "sglang_config"
"""Key of srt-slurm's recipes: a mapping of flags for each role, `prefill`, `decode` or `aggregated`."""


class Word(str):
    """A word's value, with its text in the shell that it was read from, and where it ends there."""

    source: str
    end: int


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
    if not recipes or (path.suffix.lower() in readers and not any(recipe.flags for recipe in recipes)):
        what = "launches vLLM" if VLLM.search(text) else "holds no launch that can be read"
        raise UsageError(f"--recipe {path} {what}: give a launch such as `sglang serve MODEL --tp-size 2`")
    return recipes


def _yaml(text: str, path: Path) -> Iterator[Recipe]:
    try:
        documents = yaml_documents(text)
    except ValueError as error:
        raise UsageError(f"--recipe {path} is not YAML: {error}") from None
    for document in (document for document in documents if document is not None):
        if backend := _backend(_mapping(document, path)):
            for role, flags in backend[ROLES].items():
                variables = backend.get(f"{role}_environment")
                yield Recipe(f"{path}: {role}", _flags(flags, path), _environment(variables, path))
        elif document.keys() & {"services", "apiVersion"}:
            yield from _containers(document, path)
        else:
            yield Recipe(str(path), _flags(document, path))


def _containers(document: Any, path: Path, name: str = "") -> Iterator[Recipe]:
    """Yield the launches of a compose or Kubernetes file: those of each mapping with words to run in a container."""
    if isinstance(document, list):
        for each in document:
            yield from _containers(each, path, name)
    if not isinstance(document, dict):
        return
    keys = ("entrypoint", "command") if "entrypoint" in document else ("command", "args")
    words = {key: listed for key in keys if (listed := _words_of(document.get(key)))}
    every = [word for listed in words.values() for word in listed]
    who = f"{path}: {document.get('name', document.get('container_name', name))}".rstrip(": ")
    if script := next((word for word in every if " " in word and LAUNCH.search(word)), None):
        for recipe in _shell(script, path, who):
            yield replace(recipe, keys=(), environment={**_of_container(document), **recipe.environment})
    elif start := _start_of(every):
        keys = (next(iter(words)), [*words][-1])
        yield Recipe(who, _flags_in(every[start:]), _of_container(document), shlex.join(every[:start]), keys)
    elif every and every[0].startswith("--model") and "sglang" in str(document.get("image")):
        raise UsageError(f"--recipe {who} has no command: add the one of its image, such as [sglang, serve]")
    else:
        for key, value in document.items():
            if not str(key).startswith("x-"):  # compose's parts for others to merge
                yield from _containers(value, path, str(key))


def _words_of(value: Any) -> list[str]:
    words = shlex.split(value.replace("\\\n", " ")) if isinstance(value, str) else value
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
    script = _Script(path, fills=not who)
    text = re.sub(r"^(?:[ \t]*#.*\n|ExecStart=-?)", "", text, flags=re.MULTILINE)
    recipes = list(islice(script.launches(text), MOST_RECIPES + 1))
    if not recipes and text.lstrip().startswith("-"):
        recipes = [Recipe("", _flags_in(script.words(text)))]
    for name, _, line in [] if recipes else OF_FLAGS.findall(text):
        yield Recipe(f"{path}: {name}", _flags_in(script.words(line)), script.environment)
    for number, recipe in enumerate(recipes, 1):
        name = (who or str(path)) + (f": {number}" if len(recipes) > 1 else "")
        yield replace(recipe, name=recipe.name or name)


@dataclass(slots=True)
class _Script:
    """A shell's script that is read in order. fills: whether variables get their values. values: all that each of them
    may hold. environment: SGLang's variables. is_code: whether a shell runs it; else it may be prose, in which a launch
    needs flags or a path, and has nothing but a known command before it. depth: of words in which it is."""

    path: Path
    fills: bool
    values: dict[str, dict[str, None]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    is_code: bool = True
    depth: int = 0

    def launches(self, text: str) -> Iterator[Recipe]:
        """Yield a text's launches, without names."""
        documents: list[str] = []
        for words in self._commands(text, documents):
            while documents:
                is_manifest = MANIFEST.search(document := documents.pop(0))
                yield from _yaml(document, self.path) if is_manifest else self._inner(document, is_code=False)
            yield from self._command(list(dropwhile(KEYWORDS.__contains__, words)))
        held = [] if self.depth else [value for values in self.values.values() for value in values]
        for value in filter(LAUNCH.search, held):  # as in `eval "$COMMAND"`
            yield from self._inner(value, is_code=False)

    def _inner(self, text: str, *, is_code: bool) -> Iterator[Recipe]:
        inner = replace(self, environment=dict(self.environment), is_code=is_code, depth=self.depth + 1)
        return inner.launches(text if inner.depth < DEEPEST else "")

    def words(self, line: str) -> list[Word]:
        """Return a line's words, with the words of arrays and the values of variables in their places, if known."""
        if len(line := USED.sub(self._value, line)) > MOST_LINE:
            raise UsageError(f"--recipe {self.path}: a launch of more than {MOST_LINE} characters is not read")
        return [word for words in self._commands(line, []) for word in words]

    def _commands(self, text: str, documents: list[str]) -> Iterator[list[Word]]:
        """Yield the words of each command, without redirections and comments. Append the here-documents that count."""
        words: list[Word] = []
        ends: list[Word] = []
        at = begun = line = 0
        while at < len(text) and (found := OPERATOR.match(text, at)):
            at = found.end()
            if found[2] is not None:
                yield words
                if found[2] == "\n":
                    is_read = READING.search(text, line, at) is not None
                    for end in ends:
                        stop = _end_of_document(text, at - 1, end)
                        body = ESCAPED.sub(r"\1", text[at:stop]) if end == end.source else text[at:stop]
                        documents += [body] if is_read else []
                        at = text.find("\n", stop) + 1 or len(text)
                    ends, line = [], at
                words, begun = [], at
            elif (word := _word(text, at)) is not None:
                at = word.end
                here = found[1] is not None and found[1].endswith(("<<", "<<-"))
                (ends if here else words).extend([word] if here or not found[1] else [])
            elif self.is_code and LAUNCH.search(text, begun):
                raise UsageError(f"--recipe {self.path} is not a shell line: No closing quotation: {text[at:]!r:.60}")
            else:
                return
        yield words

    def _command(self, words: list[Word]) -> Iterator[Recipe]:
        """Yield a command's launches, and take what it sets."""
        command = next((word for word in words if not ASSIGNED.match(word)), "")
        if command not in SETTING and LAUNCH.search(" ".join(words)):
            yield from self._launch(" ".join(word.source for word in words))
        for word in words if command in UNSETTING else ():
            self.environment.pop(word, None)
            self.values[word] = dict.fromkeys(("", word))
        for word in words if command in SETTING else ():
            if len(word) > MOST_LINE or not (found := ASSIGNED.match(word)):
                continue
            name, value = found[1], USED.sub(self._value, word[found.end() :])
            has_own = f"${name}" in word or f"${{{name}" in word
            if is_array := word.source[found.end() :].startswith("("):
                value = " ".join(each.source for each in self.words(value[1:-1]))
            if has_own:
                self.values[name] = {value: None}
            elif is_array or found[2]:
                self.values[name] = {old + " " * is_array + value: None for old in self.values.get(name) or ("",)}
            else:
                self.values.setdefault(name, {})[value] = None
            if name.startswith("SGLANG_") and not value.startswith("--") and not LAUNCH.search(value):
                self.environment[name] = value

    def _launch(self, line: str) -> Iterator[Recipe]:
        """Yield the launch that a command is, or those that a shell reads from its words."""
        words = self.words(line)
        start = _start_of(words)
        first, last, inner = "", "", replace(self, environment=dict(self.environment))
        for word in words[:start] or words:
            if SAYING.fullmatch(word.rpartition("/")[2]) and last[:1] != "-":
                return
            first = first or ("" if ASSIGNED.match(word) else word)
            is_known = first[:1] == "$" or "/" in first or STARTING.fullmatch(first) is not None
            if not start and LAUNCH.search(text := word.removeprefix("--wrap=")):
                is_command = text.startswith(("$(", "(", "`"))
                is_code = is_command or is_known or (last[:1] == "-" and last[-1:] == "c")  # as in `bash -lc "…"`
                text = text.removeprefix("$")[1:-1] if is_command else text
                for recipe in inner._inner(text, is_code=is_code):
                    yield replace(recipe, keys=() if "docker" in words else recipe.keys)
            elif found := VARIABLE.search(word):
                inner.environment[found[1]] = found[2]
            last = word
        rest = words[start:]
        is_told = any(word.startswith("--") for word in rest) or "/" in "".join(rest[:1])
        accepts = any if self.is_code else all
        if not (start and rest and accepts((is_known, is_told))) or {"-h", "--help"} & {*rest}:
            return
        if MANY.match(rest[0].source):
            raise UsageError(f"--recipe {self.path}: {rest[0]} is not read: it may hold any flags; write them there")
        yield Recipe("", _flags_in(rest), inner.environment, " ".join(word.source for word in words[:start]))

    def _value(self, found: re.Match[str]) -> str:
        """Return an array's words, or a variable's only value or its default, in place of its name; else that."""
        name, default = found[2] or found[3], [found[5]] if found[5] else []
        values = [*self.values.get(name, default)] if self.fills or found[4] else []
        if len(values) != 1 or len(values[0]) > MOST_VALUE:
            return found[0]
        if found[4] or not UNSAFE.search(values[0]):
            return values[0] if found[4] else f"{found[1]}{values[0]}{found[1]}"
        return shlex.quote(values[0]) if found[1] and "$" not in values[0] else found[0]


def _start_of(words: Iterable[str]) -> int:
    """Return the number of a command's words before SGLang's flags; 0 if it launches nothing."""
    return next((end for end, pair in enumerate(pairwise(words), 2) if SERVER.fullmatch(" ".join(pair))), 0)


def _word(text: str, begin: int) -> Word | None:
    """Read the shell's word at `begin`, in which commands and arrays stay as written. None if one of them or a quote
    stays open."""
    pieces, opened, at = list[str](), list[str](), begin
    while found := MARK.search(text, at):
        if not opened and (found[2] or found[3]) and (found[3], found.start()) != ("(", begin):
            break
        mark, top, is_inner = found[0], opened[-1] if opened else "", opened not in ([], ['"'])
        pieces.append(text[at : found.start()])
        at = found.end()
        if mark[0] == "\\":
            mark = mark if is_inner or (top and mark[1] not in '"\\$`\n') else mark[1:].strip("\n")
        elif mark == top:
            opened.pop()
            mark = mark if is_inner else ""
        elif (mark == "'" and top != '"') or (mark == "#" and top == ")"):
            if (end := text.find("\n" if mark == "#" else mark, at)) < 0:
                return None
            mark, at = text[at - is_inner : end + is_inner], end + 1
        elif found[2] and top == ")":
            at = _end_of_document(text, at, found[2])
            mark = text[found.start() : at]
        elif (found[1] and (top != '"' or mark[0] not in "<>(")) or (mark == "(" and top in ("", ")")):
            opened.append({"${": "}"}.get(mark, mark if mark in '"`' else ")"))
            mark = mark if mark != '"' or is_inner else ""
        pieces.append(mark)
    end = found.start() if found else len(text)
    word = Word("".join([*pieces, text[at:end]]))
    word.source, word.end = text[begin:end].replace("\\\n", ""), end
    return None if opened else word


def _end_of_document(text: str, at: int, name: str) -> int:
    """Return the place of the line that ends a here-document, which begins in the line after `at`; else the text's."""
    at = text.find("\n", at) + 1 or len(text)
    while text[at : (after := text.find("\n", at) + 1 or len(text))].strip() != name and at < len(text):
        at = after
    return at


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
