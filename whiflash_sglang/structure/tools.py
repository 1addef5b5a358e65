"""What a request's tools tell of its calls, from the process that serves HTTP to the scheduler's."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from whiflash_sglang.spans.fields import json_of
from whiflash_sglang.spans.hints import MAX_TOOLS_CHARS
from whiflash_sglang.structure.forms import PARSERS
from whiflash_sglang.structure.schemas import MOST_WORDS, canonical, forced_contents, words_of

ARGUMENTS: Final = {
    **dict.fromkeys(("hermes", "qwen", "qwen25", "trinity"), "arguments"),
    "llama3": "parameters",
}
"""Parsers whose calls are one JSON object, and the name of the arguments in it."""

KEPT = 128
"""Lists of tools that are kept read and compiled, whoever sent them: equal lists share one."""


class Tools(NamedTuple):
    """form: the name of the arguments of calls in JSON, else a key of `forms.PARSERS`. functions: name and schema of
    the parameters of each, whatever its caller gave.
    """

    form: str
    functions: Sequence[tuple[str, Any]]


def carried_tools(functions: Sequence[tuple[str | None, object]], parser: str | None) -> str | None:
    """What a request's tools tell of its calls, for `custom_params`.

    None where calls of this parser are not known, or where they tell too much.

    Args:
        functions: name and schema of the parameters of each. parser: the server's `--tool-call-parser`.
    """
    form = ARGUMENTS.get(parser or "", parser if parser in PARSERS else None)
    if form is None:
        return None
    text = json.dumps([form, functions])
    return text if len(text) <= MAX_TOOLS_CHARS else None


@lru_cache(maxsize=KEPT)
def read_tools(text: str) -> Tools | None:
    """None where `carried_tools` did not write it."""
    if len(text) > MAX_TOOLS_CHARS:
        return None
    try:
        form, functions = json_of(text)
        return Tools(str(form), tuple((str(name), parameters) for name, parameters in functions))
    except (ValueError, TypeError, RecursionError):
        return None


def words_of_tools(text: str) -> tuple[str, ...]:
    """Names of the tools, then the words of their schemas."""
    tools = read_tools(text)
    if tools is None:
        return ()
    names = [name for name, _ in tools.functions]
    return tuple(dict.fromkeys((*names, *words_of(text))))[:MOST_WORDS]


@lru_cache(maxsize=KEPT)
def all_forced(schema: str, tools: str) -> bool:
    """Whether a grammar forces a call and says all of it that its tools tell: calls in JSON, of strict tools.

    Args:
        schema: of the grammar, as of `Grammar`.
    """
    read, contents = read_tools(tools), forced_contents(schema)
    if read is None or read.form not in ARGUMENTS.values() or not contents:
        return False
    return all(canonical(parameters) in contents for _, parameters in read.functions if parameters)


def properties_of(parameters: object) -> Mapping[str, Any]:
    """Schemas of a tool's arguments by name, in their order; none where they are not written as an object's."""
    found = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return {str(key): schema for key, schema in found.items()} if isinstance(found, Mapping) else {}


def required_of(parameters: object) -> frozenset[str]:
    """Names of the arguments that a call must have."""
    found = parameters.get("required") if isinstance(parameters, Mapping) else None
    return frozenset(key for key in found if isinstance(key, str)) if isinstance(found, list) else frozenset()


def listed_of(schema: object) -> tuple[str, ...]:
    """The only values that an argument may have, as markup shows them; empty where it is free."""
    if not isinstance(schema, Mapping):
        return ()
    listed = schema.get("enum")
    if "const" in schema:
        listed = [schema["const"]]
    elif schema.get("type") == "boolean":
        listed = [True, False]
    if not isinstance(listed, list):
        return ()
    texts = (value if isinstance(value, str) else json.dumps(value) for value in listed[:MOST_WORDS])
    return tuple(dict.fromkeys(text for text in texts if text))
