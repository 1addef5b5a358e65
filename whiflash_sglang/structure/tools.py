"""A request's tools and the form of its calls: the HTTP process hands them to the scheduler's."""

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from whiflash_sglang.spans.hints import MAX_TOOLS_CHARS, json_of
from whiflash_sglang.structure.schemas import MOST_WORDS, canonical, forced_contents, words_of


class Form(NamedTuple):
    """A call between the markers of its span. Blanks at the ends of a part are usual, not fixed.

    call: begins it, with the tool's {name}, and with its {index} where they are counted. argument: begins one, with its
    {key}, whether its value is a {string} ("true" or "false"), or its {type}. value: the text around one. close:
    ends the call; empty where the span's end does. end: blanks before that. several: whether more calls may follow in
    one span.
    """

    call: str
    argument: str
    value: str
    close: str
    end: str = ""
    several: bool = False


def _invoke(prefix: str = "", name: str = "invoke", parameter: str = "parameter", string: str = "") -> Form:
    """Form of `<invoke name="…"><parameter name="…">`."""
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

_FUNCTION = Form(
    "\n<function={name}>", "\n<parameter={key}>", "\n{value}\n</parameter>", "\n</function>", "\n"
)
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
"""Marked as `whiflash_sdk.presets` says."""


ARGUMENTS: Final = {
    **dict.fromkeys(("hermes", "qwen", "qwen25", "trinity"), "arguments"),
    "llama3": "parameters",
}
"""Parsers whose calls are one JSON object, and the name of the arguments in it."""

MOST_FUNCTIONS: Final = 128
"""Tools of a request whose calls are guessed: their grammar compiles in 0.1 s, that of 3,000 in 5 s."""

KEPT = 128
"""Lists of tools that are kept read and compiled, whoever sent them: equal lists share one."""


class Tools(NamedTuple):
    """form: the name of the arguments of calls in JSON, else a key of `PARSERS`. functions: name and schema of
    the parameters of each, whatever its caller gave. known: what was asked about calls of them (`MarkupCall`).
    """

    form: str
    functions: Sequence[tuple[str, Any]]
    known: dict[Hashable, Any]


def carried_tools(functions: Sequence[tuple[str | None, object]], parser: str | None) -> str | None:
    """The tools of a request and the form of its calls, for `custom_params`.

    None if calls of this parser are not known, or if the text is too long or nests too deep.

    Args:
        functions: name and schema of the parameters of each. parser: the server's `--tool-call-parser`.
    """
    form = ARGUMENTS.get(parser or "", parser if parser in PARSERS else None)
    if form is None or len(functions) > MOST_FUNCTIONS:
        return None
    try:
        text = json.dumps([form, functions], ensure_ascii=False)
        text[: MAX_TOOLS_CHARS + 1].encode()
    except (RecursionError, UnicodeEncodeError):  # SGLang refuses such a schema by name; half a character
        return None
    return text if len(text) <= MAX_TOOLS_CHARS else None


@lru_cache(maxsize=KEPT)
def read_tools(text: str) -> Tools | None:
    """None where `carried_tools` did not write it."""
    if len(text) > MAX_TOOLS_CHARS:
        return None
    try:
        form, functions = json_of(text)
        return Tools(str(form), tuple((str(name), parameters) for name, parameters in functions), {})
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
    """Whether a grammar forces a call and states all that its tools do: calls in JSON, of strict tools.

    Args:
        schema: of the grammar, as of `Grammar`.
    """
    read, contents = read_tools(tools), forced_contents(schema)
    if read is None or read.form not in ARGUMENTS.values() or not contents:
        return False
    return all(canonical(parameters) in contents for _, parameters in read.functions if parameters)


def properties_of(parameters: object) -> Mapping[str, Any]:
    """Schemas of a tool's arguments by name, in their order; none where they are not written as an object's."""
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return {str(key): schema for key, schema in properties.items()} if isinstance(properties, Mapping) else {}


def required_of(parameters: object) -> frozenset[str]:
    """Names of the arguments that a call must have."""
    required = parameters.get("required") if isinstance(parameters, Mapping) else None
    names = required if isinstance(required, list) else ()
    return frozenset(key for key in names if isinstance(key, str))


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
