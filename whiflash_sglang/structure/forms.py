"""How calls in markup are written, by the names of SGLang's parsers (0.5.23), which read what their templates show."""

from typing import Final, NamedTuple


class Form(NamedTuple):
    """A call between the markers of its span. Blanks at the ends of a part are usual, not fixed.

    call: begins it, with the tool's {name}, and with its {index} where they are counted. argument: begins one, with its
    {key}, whether its value is a {string} ("true" or "false"), or its {type}. value: what stands around one. close:
    ends the call; empty where the span's end does. end: blanks before that. several: whether more calls may stand in
    one span.
    """

    call: str
    argument: str
    value: str
    close: str
    end: str = ""
    several: bool = False


def _invoke(prefix: str = "", name: str = "invoke", parameter: str = "parameter", string: str = "") -> Form:
    """Of `<invoke name="…"><parameter name="…">`."""
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
        "{name}",
        "\n<ifm|arg_key>{key}</ifm|arg_key>",
        "\n<ifm|arg_value>{value}</ifm|arg_value>",
        "",
        "\n",
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
