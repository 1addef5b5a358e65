"""A request's tools and the form of its calls, as the HTTP process sends them to the scheduler."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from whiflash_sglang.spans.hints import MAX_TOOLS_CHARS, json_of
from whiflash_sglang.structure.schemas import MOST_WORDS, canonical, forced_contents, words_of


class Form(NamedTuple):
    """The text of calls between the markers of a span. Blanks at the ends of a part are usual, not fixed.

    call: begins a call, with the tool's {name}, and with its {index} if calls are counted. argument: begins an
    argument, with its {key}, its {type}, or whether its value is a {string} ("true" or "false"). value: the text around
    a value. close: ends the call; empty if the span's end does. end: blanks before the span's end. several: whether a
    span may have several calls.
    """

    call: str
    argument: str
    value: str
    close: str
    end: str = ""
    several: bool = False


def _invoke(prefix: str = "", name: str = "invoke", parameter: str = "parameter", string: str = "") -> Form:
    """Make the form of calls like `<invoke name="…"><parameter name="…">`. prefix: of tags. string: an attribute."""
    return Form(
        f'\n<{prefix}{name} name="{{name}}">',
        f'\n<{prefix}{parameter} name="{{key}}"{string}>',
        f"{{value}}</{prefix}{parameter}>",
        f"\n</{prefix}{name}>",
        "\n",
        several=True,
    )


_STRING = ' string="{string}"'
_DSML = "｜DSML｜"
_MINIMAX = "]<]minimax[>["

_FUNCTION = Form("\n<function={name}>", "\n<parameter={key}>", "\n{value}\n</parameter>", "\n</function>", "\n")
_GLM45 = Form("{name}", "\n<arg_key>{key}</arg_key>", "\n<arg_value>{value}</arg_value>", "", "\n")
_GLM47 = Form("{name}", "<arg_key>{key}</arg_key>", "<arg_value>{value}</arg_value>", "")

PARSERS: Final[dict[str, Form]] = {
    **dict.fromkeys(("qwen3_coder", "step3p5", "nanbeige"), _FUNCTION),
    "mimo": _FUNCTION._replace(value="{value}</parameter>"),
    **dict.fromkeys(("glm", "glm45", "ling3", "poolside_v1"), _GLM45),
    "spark25": _GLM45._replace(value="<arg_value>{value}</arg_value>"),
    **dict.fromkeys(("glm47", "iquest_q1"), _GLM47),
    "k2_horizon": Form(
        "{name}", "\n<ifm|arg_key>{key}</ifm|arg_key>", "\n<ifm|arg_value>{value}</ifm|arg_value>", "", "\n"
    ),
    **dict.fromkeys(("minimax-m2", "dots"), _invoke()),
    "minimax-m3": Form(
        f'\n{_MINIMAX}<invoke name="{{name}}">',
        f"{_MINIMAX}<{{key}}>",
        f"{{value}}{_MINIMAX}</{{key}}>",
        f"{_MINIMAX}</invoke>",
        "\n",
        several=True,
    ),
    **dict.fromkeys(("deepseekv32", "deepseekv4"), _invoke(_DSML, string=_STRING)),
    "deepseekv41": _invoke(_DSML, " invoke", " parameter", _STRING),
    "gigachat35": _invoke("｜GCML｜", string=_STRING),
    "kimi_k3": Form(
        '<|open|>call tool="{name}" index="{index}"<|sep|>',
        '<|open|>argument key="{key}" type="{type}"<|sep|>',
        "{value}<|close|>argument<|sep|>",
        "<|close|>call<|sep|>",
        several=True,
    ),
    "minicpm5": Form(' name="{name}">', '<param name="{key}">', "{value}</param>", ""),
    "step3": Form(
        '\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">',
        '\n<steptml:parameter name="{key}">',
        "{value}</steptml:parameter>",
        "\n</steptml:invoke><｜tool_call_end｜>",
        "\n",
        several=True,
    ),
}
"""Forms of calls in markup, by `--tool-call-parser`. `whiflash_sdk.presets` has the markers of their spans."""


ARGUMENTS: Final = {**dict.fromkeys(("hermes", "qwen", "qwen25", "trinity"), "arguments"), "llama3": "parameters"}
"""Parsers whose calls are one JSON object, and the name that its arguments have in it."""

MOST_FUNCTIONS: Final = 128
"""Most tools of a request whose calls are guessed: their grammar compiles in 0.1 s, that of 3,000 in 5 s."""

KEPT = 128
"""Number of lists of tools that are cached as read and compiled; requests with equal lists share one."""


class Tools(NamedTuple):
    """A request's tools. form: the JSON key that holds a call's arguments, if calls are JSON; else a key of `PARSERS`.
    functions: name and parameters' schema of each tool, as the caller gave it.
    """

    form: str
    functions: Sequence[tuple[str, Any]]


def carried_tools(functions: Sequence[tuple[str | None, object]], parser: str | None) -> str | None:
    """Write the tools of a request and the form of its calls as JSON, for `custom_params`.

    None if calls of this parser are not known, or if the tools are too many, their text too long or nested too deep.

    Args:
        functions: name and parameters' schema of each tool. parser: the server's `--tool-call-parser`.
    """
    form = ARGUMENTS.get(parser or "", parser if parser in PARSERS else None)
    if form is None or len(functions) > MOST_FUNCTIONS:
        return None
    try:
        text = json.dumps([form, functions], ensure_ascii=False)
        text[: MAX_TOOLS_CHARS + 1].encode()
    except (RecursionError, UnicodeEncodeError):  # nested too deep, which SGLang refuses; half a character
        return None
    return text if len(text) <= MAX_TOOLS_CHARS else None


@lru_cache(maxsize=KEPT)
def read_tools(text: str) -> Tools | None:
    """Parse the text of `carried_tools`; None if it is another text."""
    if len(text) > MAX_TOOLS_CHARS:
        return None
    try:
        form, functions = json_of(text)
        return Tools(str(form), tuple((str(name), parameters) for name, parameters in functions))
    except (ValueError, TypeError, RecursionError):
        return None


def words_of_tools(text: str) -> tuple[str, ...]:
    """Return the names of the tools, then the words of their schemas."""
    tools = read_tools(text)
    if tools is None:
        return ()
    names = [name for name, _ in tools.functions]
    return tuple(dict.fromkeys((*names, *words_of(text))))[:MOST_WORDS]


@lru_cache(maxsize=KEPT)
def all_forced(schema: str, tools: str) -> bool:
    """Whether a grammar forces a call and contains the tools' whole schemas: calls in JSON, of strict tools.

    Args:
        schema: of the grammar, as in `Grammar`.
    """
    read, contents = read_tools(tools), forced_contents(schema)
    if read is None or read.form not in ARGUMENTS.values() or not contents:
        return False
    return all(canonical(parameters) in contents for _, parameters in read.functions if parameters)


def properties_of(parameters: object) -> Mapping[str, Any]:
    """Return the schemas of a tool's arguments by name, in order; empty unless `parameters` describe an object."""
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return {str(key): schema for key, schema in properties.items()} if isinstance(properties, Mapping) else {}


def required_of(parameters: object) -> frozenset[str]:
    """Return the names of the arguments that a call must have."""
    required = parameters.get("required") if isinstance(parameters, Mapping) else None
    names = required if isinstance(required, list) else ()
    return frozenset(key for key in names if isinstance(key, str))


def listed_of(schema: object) -> tuple[str, ...]:
    """Return the only values that an argument may have, as markup shows them; empty if it may have others."""
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
