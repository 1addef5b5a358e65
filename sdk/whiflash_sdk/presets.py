"""Markers of tool calls and reasoning in chat templates, and the spans that a request is likely to write.

Markers are those that SGLang 0.5.23's parsers of the same names look for; a test compares them with its classes.
A marker here is the part that all variants of a format share, so `<tool_call>` covers both the tight and the newline
style, and Hunyuan's ends where its tokenizers begin to differ. `response_template` has no markers of its own.
"""

from __future__ import annotations

from typing import Final

from whiflash_sdk.hints import Span


def _tool(begin: str, end: str | None = None) -> Span:
    return Span(kind="tool_call", begin=begin, end=end)


def _thought(begin: str, end: str) -> Span:
    return Span(kind="reasoning", begin=begin, end=end)


HERMES: Final = (_tool("<tool_call>", "</tool_call>"),)
LLAMA3: Final = (_tool("<|python_tag|>"), _tool('{"name":'))
DEEPSEEK: Final = (_tool("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),)
PLAIN_JSON: Final = (Span(kind="json", open=True),)

THINK: Final = (_thought("<think>", "</think>"),)
HARMONY_ANALYSIS: Final = (_thought("<|channel|>analysis<|message|>", "<|end|>"),)

FENCES: Final = (Span(kind="json", begin="```json", end="```"), Span(kind="code", begin="```", end="```"))

TOOL_CALL_PARSERS: Final[dict[str, tuple[Span, ...]]] = {
    **dict.fromkeys(("hermes", "qwen", "qwen25", "qwen3_coder", "nanbeige", "step3p5", "mimo"), HERMES),
    **dict.fromkeys(("glm", "glm45", "glm47", "ling3", "poolside_v1", "spark25", "trinity"), HERMES),
    "llama3": LLAMA3,
    "pythonic": (_tool("<|python_start|>", "<|python_end|>"),),
    "mistral": (_tool("[TOOL_CALLS]"),),
    **dict.fromkeys(("deepseekv3", "deepseekv31"), DEEPSEEK),
    "deepseekv32": (_tool("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),),
    "deepseekv4": (_tool("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),),
    "deepseekv41": (_tool("<｜DSML｜ calls>", "</｜DSML｜ calls>"),),
    "gpt-oss": (_tool("to=functions.", "<|call|>"),),
    "kimi_k2": (_tool("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),),
    "minimax-m2": (_tool("<minimax:tool_call>", "</minimax:tool_call>"),),
    "step3": (_tool("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),),
    "lfm2": (_tool("<|tool_call_start|>", "<|tool_call_end|>"),),
    "interns1": (_tool("<|action_start|>", "<|action_end|>"),),
    "apertus2509": (_tool("<|tools_prefix|>", "<|tools_suffix|>"),),
    "beam": (_tool("<|constrain|>xml<|message|>", "<|call|>"),),
    "cohere_command4": (_tool("<|START_ACTION|>", "<|END_ACTION|>"),),
    "dots": (_tool("<dots_function_call>", "</dots_function_call>"),),
    "gemma4": (_tool("<|tool_call>", "<tool_call|>"),),
    "gigachat3": (_tool("<|function_call|>"), _tool("function call<|role_sep|>")),
    "gigachat35": (_tool("<｜GCML｜tool_calls>", "</｜GCML｜tool_calls>"),),
    "hunyuan": (_tool("<tool_calls", "</tool_calls"),),
    "inkling": (_tool("<|content_invoke_tool_json|>", "<|end_message|>"),),
    "iquest_q1": (_tool("<iquest_tool_call>", "</iquest_tool_call>"),),
    "k2_horizon": (_tool("<ifm|tool_call>", "</ifm|tool_call>"),),
    "kimi_k3": (_tool("<|open|>tools<|sep|>", "<|close|>tools<|sep|>"),),
    "minicpm5": (_tool("<function", "</function>"),),
    "minimax-m3": (_tool("]<]minimax[>[<tool_call>", "]<]minimax[>[</tool_call>"),),
    "muse": (_tool("<atem:function_calls>", "</atem:function_calls>"),),
}

REASONING_PARSERS: Final[dict[str, tuple[Span, ...]]] = {
    **dict.fromkeys(("deepseek-r1", "deepseek-v3", "qwen3", "qwen3-thinking", "glm45", "ling3"), THINK),
    **dict.fromkeys(("kimi_k2", "minimax", "nanbeige", "step3", "step3p5", "interns1", "mimo"), THINK),
    **dict.fromkeys(("granite_thinking_parser", "iquest_q1", "dots", "deepseek-v4", "deepseek-v41"), THINK),
    **dict.fromkeys(("gigachat35", "minimax-append-think", "nemotron_3", "poolside_v1"), THINK),
    "kimi": (_thought("◁think▷", "◁/think▷"),),
    "mistral": (_thought("[THINK]", "[/THINK]"),),
    **dict.fromkeys(("gpt-oss", "beam"), HARMONY_ANALYSIS),
    "apertus2509": (_thought("<|inner_prefix|>", "<|inner_suffix|>"),),
    "cohere_command4": (_thought("<|START_THINKING|>", "<|END_THINKING|>"),),
    "gemma4": (_thought("<|channel>", "<channel|>"),),
    "hunyuan": (_thought("<think", "</think"),),
    "inkling": (_thought("<|content_thinking|>", "<|end_message|>"),),
    "k2_horizon": (_thought("<ifm|think", "</ifm|think"),),
    "kimi_k3": (_thought("<|open|>think<|sep|>", "<|close|>think<|sep|>"),),
    "minimax-m3": (_thought("<mm:think>", "</mm:think>"),),
    "muse": (_thought(" to=self<|message|>", "<|eom|>"),),
}

# Reasoning parsers of models whose output starts inside the reasoning, by their template or training.
OPENS_REASONING: Final = frozenset(
    {
        *("deepseek-r1", "gigachat35", "step3", "step3p5", "qwen3-thinking", "minimax"),
        *("cohere_command4", "iquest_q1", "k2_horizon", "kimi_k3"),
    }
)


# Tool-call parsers of models that write arguments in markup: their strings are written as they are, not as JSON.
MARKUP_ARGUMENTS: Final = frozenset(
    {
        *("qwen3_coder", "step3p5", "nanbeige", "mimo", "glm", "glm45", "ling3", "poolside_v1", "spark25"),
        *("glm47", "iquest_q1", "k2_horizon", "minimax-m2", "dots", "minimax-m3", "deepseekv32"),
        *("deepseekv4", "deepseekv41", "gigachat35", "kimi_k3", "minicpm5", "step3"),
    }
)


def likely_spans(
    *,
    tool_parser: str | None,
    reasoning_parser: str | None,
    has_tools: bool,
    response_format: str | None,
    forced: bool,
    reasoning_open: bool | None = None,
    prefill: str = "",
) -> tuple[Span, ...]:
    """Return the spans that a request's output is likely to have. Parsers that are not known here add no spans.

    tool_parser, reasoning_parser: names of the server's parsers. has_tools: the request offers tools and does not
    forbid them. response_format: the request's `response_format.type`. forced: the grammar makes the output a tool call
    from its first token (`tool_choice` required or named). reasoning_open: the prompt ends inside the reasoning; None:
    if it usually does with this parser. prefill: the beginning of the answer, if the request contains it.
    """
    reasoning = REASONING_PARSERS.get(reasoning_parser or "", ())
    if reasoning_open is None:
        reasoning_open = reasoning_parser in OPENS_REASONING
    tools = TOOL_CALL_PARSERS.get(tool_parser or "", ()) if has_tools else ()
    if has_tools and forced:
        # The output is inside the call from its first byte, because the grammar contains the begin marker.
        first, *others = tools or (Span(kind="tool_call", open=True),)
        tools = (first.model_copy(update={"open": True}), *others)
    whole_json = response_format in ("json_object", "json_schema")
    body = PLAIN_JSON if whole_json and not (has_tools and forced) else ()
    fences = () if whole_json or (has_tools and forced) else FENCES
    opened = tuple(span.model_copy(update={"open": reasoning_open}) for span in reasoning)
    spans = (*opened, *tools, *body, *fences)
    return tuple(_after(span, prefill) for span in spans) if prefill else spans


def _after(span: Span, text: str) -> Span:
    """Return the span, open or closed as `text` leaves it: the output continues after this text."""
    is_open, at = span.open, 0
    while marker := span.end if is_open else span.begin:
        place = text.find(marker, at)
        if place < 0:
            break
        at, is_open = place + len(marker), not is_open
    return span.model_copy(update={"open": is_open}) if is_open or span.begin else span
