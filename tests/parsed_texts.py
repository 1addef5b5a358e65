"""Calls and reasoning as models write them, in the format of every parser of SGLang."""

import json
from collections.abc import Callable, Mapping, Sequence

Call = tuple[str, int]
"""City and days of a call of `get_weather`."""

CALLS: Sequence[Call] = (("Köln 東京", 3), ("São Paulo", 14))


def _arguments(call: Call) -> str:
    return json.dumps({"city": call[0], "days": call[1]}, ensure_ascii=False)


def _json(call: Call, arguments: str = "arguments", name: str = "name") -> str:
    return f'{{"{name}": "get_weather", "{arguments}": {_arguments(call)}}}'


def _each(form: str, begin: str = "", end: str = "", between: str = "") -> Callable[[Sequence[Call]], str]:
    """Calls in a form with places for `{city}`, `{days}`, `{arguments}`, `{call}` and `{index}`."""

    def written(calls: Sequence[Call]) -> str:
        forms = []
        for index, call in enumerate(calls):
            places = {"city": call[0], "days": str(call[1]), "arguments": _arguments(call)}
            places |= {"call": _json(call), "index": str(index)}
            filled = form
            for name, value in places.items():
                filled = filled.replace(f"{{{name}}}", value)
            forms.append(filled)
        return begin + between.join(forms) + end

    return written


_HERMES = _each("<tool_call>\n{call}\n</tool_call>", between="\n")
_QWEN_CODER = _each(
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n<parameter=days>\n{days}\n"
    "</parameter>\n</function>\n</tool_call>",
    between="\n",
)
_PAIRS = (
    "<arg_key>city</arg_key>{s}<arg_value>{city}</arg_value>{s}<arg_key>days</arg_key>{s}"
    "<arg_value>{days}</arg_value>{s}"
)
_GLM = _each("<tool_call>get_weather\n" + _PAIRS.replace("{s}", "\n") + "</tool_call>", between="\n")
_INVOKE = (
    '<{n}invoke name="get_weather">\n<{n}parameter name="city"{s}>{city}</{n}parameter>\n'
    '<{n}parameter name="days"{i}>{days}</{n}parameter>\n</{n}invoke>'
)


def _marked(name: str, block: str, typed: bool = True) -> Callable[[Sequence[Call]], str]:
    """Calls between tags that begin with `name`."""
    form = _INVOKE.replace("{n}", name)
    form = form.replace("{s}", ' string="true"' if typed else "")
    form = form.replace("{i}", ' string="false"' if typed else "")
    return _each(form, f"<{name}{block}>\n", f"\n</{name}{block}>", "\n")


_BEAM = _each(
    " to=get_weather<|channel|>analysis <|constrain|>xml<|message|>"
    '<rfl:parameter name="city">\n{city}\n</rfl:parameter><rfl:parameter name="days">\n{days}\n</rfl:parameter>',
    end="<|call|>",
    between="<|end|><|start|>assistant",
)
_NS = "]<]minimax[>["
_OPEN, _CLOSE, _SEP = "<|open|>", "<|close|>", "<|sep|>"

TOOL_FORMATS: Mapping[str, Callable[[Sequence[Call]], str]] = {
    "apertus2509": _each('{"get_weather": {arguments}}', "<|tools_prefix|>[", "]<|tools_suffix|>", ", "),
    "beam": _BEAM,
    "cohere_command4": _each(
        '{"tool_call_id": "{index}", "tool_name": "get_weather", "parameters": {arguments}}',
        "<|START_ACTION|>[\n",
        "\n]<|END_ACTION|>",
        ",\n",
    ),
    "deepseekv3": _each(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{arguments}\n```<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "\n",
    ),
    "deepseekv31": _each(
        "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "deepseekv32": _marked("｜DSML｜", "function_calls"),
    "deepseekv4": _marked("｜DSML｜", "tool_calls"),
    "deepseekv41": _marked("｜DSML｜ ", "calls"),
    "dots": _marked("", "dots_function_call", typed=False),
    "gemma4": _each('<|tool_call>call:get_weather{city:<|"|>{city}<|"|>,days:{days}}<tool_call|>'),
    "gigachat3": _each("function call<|role_sep|>\n{call}"),
    "gigachat35": _marked("｜GCML｜", "tool_calls"),
    **dict.fromkeys(("glm", "glm45", "ling3", "poolside_v1"), _GLM),
    "glm47": _each("<tool_call>get_weather" + _PAIRS.replace("{s}", "") + "</tool_call>"),
    "gpt-oss": _each(
        "<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>{arguments}<|call|>",
        between="<|start|>assistant",
    ),
    **dict.fromkeys(("hermes", "qwen", "qwen25", "trinity"), _HERMES),
    "hunyuan": _each(
        "<tool_call>get_weather<tool_sep>\n" + _PAIRS.replace("{s}", "\n") + "</tool_call>",
        "<tool_calls>\n",
        "\n</tool_calls>",
        "\n",
    ),
    "inkling": _each(
        '<|message_model|>get_weather<|content_invoke_tool_json|>{"name": "get_weather", "args": {arguments}}'
        "<|end_message|>"
    ),
    "interns1": _each("<|action_start|> <|plugin|>\n{call}<|action_end|>"),
    "iquest_q1": _each(
        "<iquest_tool_call>get_weather" + _PAIRS.replace("{s}", "") + "</iquest_tool_call>", between="\n"
    ),
    "k2_horizon": _each(
        "<ifm|tool_call>get_weather<ifm|arg_key>city</ifm|arg_key><ifm|arg_value>{city}</ifm|arg_value>"
        "<ifm|arg_key>days</ifm|arg_key><ifm|arg_value>{days}</ifm|arg_value></ifm|tool_call>",
        "<ifm|tool_calls>",
        "</ifm|tool_calls>",
    ),
    "kimi_k2": _each(
        "<|tool_call_begin|>functions.get_weather:{index}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
    ),
    "kimi_k3": _each(
        f'{_OPEN}call tool="get_weather" index="{{index}}"{_SEP}'
        f'{_OPEN}argument key="city" type="string"{_SEP}{{city}}{_CLOSE}argument{_SEP}'
        f'{_OPEN}argument key="days" type="number"{_SEP}{{days}}{_CLOSE}argument{_SEP}{_CLOSE}call{_SEP}',
        f"{_OPEN}tools{_SEP}",
        f"{_CLOSE}tools{_SEP}",
    ),
    "lfm2": _each(
        'get_weather(city="{city}", days={days})', "<|tool_call_start|>[", "]<|tool_call_end|>", ", "
    ),
    "llama3": lambda calls: "<|python_tag|>" + ";".join(_json(call, "parameters") for call in calls),
    "mimo": _each(
        "<tool_call>\n<function=get_weather>\n<parameter=city>{city}</parameter>\n<parameter=days>{days}"
        "</parameter>\n</function>\n</tool_call>",
        between="\n",
    ),
    "minicpm5": _each(
        '<function name="get_weather"><param name="city">{city}</param><param name="days">{days}</param></function>',
        between="\n",
    ),
    "minimax-m2": _each(
        _INVOKE.replace("{n}", "").replace("{s}", "").replace("{i}", ""),
        "<minimax:tool_call>\n",
        "\n</minimax:tool_call>",
        "\n",
    ),
    "minimax-m3": _each(
        f'{_NS}<invoke name="get_weather">{_NS}<city>{{city}}{_NS}</city>{_NS}<days>{{days}}{_NS}</days>'
        f"{_NS}</invoke>",
        f"{_NS}<tool_call>\n",
        f"\n{_NS}</tool_call>",
        "\n",
    ),
    "mistral": _each("{call}", "[TOOL_CALLS] [", "]", ", "),
    "muse": lambda calls: f" to=get_weather<|message|>{_marked('atem:', 'function_calls')(calls)}<|eom|>",
    **dict.fromkeys(("qwen3_coder", "step3p5", "nanbeige"), _QWEN_CODER),
    "pythonic": _each('get_weather(city="{city}", days={days})', "[", "]", ", "),
    "response_template": _BEAM,
    "spark25": _each("<tool_call>get_weather\n" + _PAIRS.replace("{s}", "") + "\n</tool_call>", between="\n"),
    "step3": _each(
        '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="get_weather">\n'
        '<steptml:parameter name="city">{city}</steptml:parameter>\n'
        '<steptml:parameter name="days">{days}</steptml:parameter>\n</steptml:invoke><｜tool_call_end｜>',
        "<｜tool_calls_begin｜>\n",
        "\n<｜tool_calls_end｜>",
        "\n",
    ),
}

_MARKS = {
    "apertus2509": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "beam": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    "cohere_command4": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma4": ("<|channel>thought\n", "<channel|>"),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "inkling": ("<|content_thinking|>", "<|end_message|><|message_model|><|content_text|>"),
    "k2_horizon": ("<ifm|think>", "</ifm|think>"),
    "kimi": ("◁think▷", "◁/think▷"),
    "kimi_k3": (f"{_OPEN}think{_SEP}", f"{_CLOSE}think{_SEP}{_OPEN}response{_SEP}"),
    "minimax-m3": ("<mm:think>", "</mm:think>"),
    "mistral": ("[THINK]", "[/THINK]"),
    "muse": (" to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"),
    "response_template": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
}


def tool_texts(parser: str) -> list[str]:
    """One call, one after prose, two calls, prose on both sides, prose alone, and a call that is cut off."""
    written = TOOL_FORMATS[parser]
    before, after = "I look < 3 {x} – gleich. ", "\nBoth [were] asked, até já."
    both = written(CALLS)
    return [
        written(CALLS[:1]),
        before + written(CALLS[:1]),
        both,
        before + both + after,
        before + after,
        before + both[: len(both) * 3 // 4],
    ]


def reasoning_texts(parser: str) -> list[str]:
    """Reasoning before an answer, after a prefilled mark, cut off, and an answer without."""
    begin, end = _MARKS.get(parser, ("<think>", "</think>"))
    reasoning, answer = "Let me <b> think: Köln 東京?\n", "\n\nI know – até já. <x>"
    return [begin + reasoning + end + answer, reasoning + end + answer, begin + reasoning, answer]
