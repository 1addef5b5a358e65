"""Tool calls that no grammar constrains: what their tools tell, and silence where something else is written."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from structure_grammars import Grammars
from whiflash_sdk.hints import Span
from whiflash_sdk.presets import LLAMA3

from whiflash_sglang.spans.hints import MAX_TOOLS_CHARS, TOOLS_KEY, parse_hints
from whiflash_sglang.spans.vocabulary import Vocabulary, text_of
from whiflash_sglang.structure.calls import Calls, compiled
from whiflash_sglang.structure.chances import SEED, Kind
from whiflash_sglang.structure.guesses import Guesses
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.schemas import MOST_NAMED_CHARS, MOST_NODES, Essence
from whiflash_sglang.structure.sketch import sketch
from whiflash_sglang.structure.tools import KEPT, MOST_FUNCTIONS, carried_tools, words_of_tools


def optional(count: int, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}, **more}


def nested(levels: int) -> dict[str, Any]:
    return optional(0, properties={"a": nested(levels - 1)}) if levels else {"type": "string"}


def doubled(levels: int) -> dict[str, Any]:
    part = {"type": "string"} if not levels else doubled(levels - 1)
    return {"anyOf": [part, {"type": "array", "items": part}]} if levels else part


WORST: dict[str, dict[str, Any]] = {
    "minProperties": optional(240, minProperties=3),
    "maxProperties": optional(120, maxProperties=7),
    "many": optional(1000),
    "nested": nested(400),
    "alternatives": doubled(9),
    "pattern": optional(0, properties={"a": {"type": "string", "pattern": "^(a|b|ab){1,20000}$"}}),
    "listed": optional(0, properties={"a": {"enum": [f"{i}" * 50 for i in range(300)]}}),
    "items": optional(0, properties={"a": {"type": "array", "minItems": 10**6, "items": {"type": "string"}}}),
    "lengths": optional(0, properties={"a": {"type": "string", "minLength": 10**6, "maxLength": 10**9}}),
    "all of": {"allOf": [optional(60, minProperties=i) for i in range(9)]},
}
"""Parameters whose whole grammar takes xgrammar seconds to hours, or gigabytes."""


SPANS = (Span(kind="tool_call", begin="<tool_call>", end="</tool_call>"),)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "kelvin"]}},
    "required": ["city", "unit"],
}
FUNCTIONS: list[tuple[str | None, Any]] = [
    ("get_weather", WEATHER),
    ("get_time", {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}),
    ("sing", None),
]
TOOLS = carried_tools(FUNCTIONS, "hermes") or ""
BEGUN = '{"name": "get_weather", "arguments": {"city": "'


def follow(
    vocabulary: Vocabulary,
    written: str,
    used: dict[str, int] | None = None,
    spans: Sequence[Span] = SPANS,
    prompt: str = "",
    tools: str = TOOLS,
) -> str:
    """Text that is proposed after `written`, without a grammar."""
    calls = Calls(tools, spans, prompt)
    calls.follow(written)
    guesses = Guesses(words_of_tools(TOOLS), lambda text: (used or {}).get(text.strip('"'), 0))
    tokens = sketch(vocabulary, vocabulary.encode(written)[-6:], 64, guesses=guesses, calls=calls)
    return text_of(vocabulary, [token.token for token in tokens])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("It is ", ""),
        ("<tool_call>\n{", '"name": "get_weather", "arguments": {"city": "'),
        ('<tool_call>{"name": "get_t', 'ime", "arguments": {"zone": "'),
        ('<tool_call>\n{"name": "sing"', ', "arguments": {}}\n</tool_call>'),
        ('<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"', "}}\n</tool_call>"),
        ('<tool_call>{"name": "get_time", "arguments": {"zone": "UTC"', "}}</tool_call>"),
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"', ', "unit": "celsius"}}\n</tool_call>'),
        ('<tool_call>\n{"tool": "x"', ""),
        ('<tool_call>\n{"tool": "x"}\n</tool_call>\n<tool_call>\n{"name"', ': "get_weather", "arguments": {"city": "'),
        ('<tool_call>\n{"name": "sing", "arguments": {}}\n</tool_call>', ""),
        ('<tool_call>\n{"name": "get_time", "arguments": {"zone": "U', ""),
        ("<", f"tool_call>\n{BEGUN}"),
        ("It is.\n<tool_", f"call>\n{BEGUN}"),
        ("<tool_call>", f"\n{BEGUN}"),
        ("<tool_call>\n", BEGUN),
        ("a <tool_", ""),
        ("<table", ""),
        ('He said "no.\n<tool_call>\n{', BEGUN[1:]),
        ('<tool_call>\n{"name": "sing", "arguments": {}}\n</', "tool_call>"),
        ('<tool_call>\n{"name": "sing", "arguments": {}}\n<', "/tool_call>"),
        ('<tool_call>\n{"name": "sing", "arguments": {}}\n</tool_call>\n<', f"tool_call>\n{BEGUN}"),
        ('<tool_call>\n{"name": "sing", "arguments": {}}\n<tool_call>\n', BEGUN),
    ],
)
def test_what_the_tools_tell(vocabulary: Vocabulary, written: str, expected: str) -> None:
    assert follow(vocabulary, written) == expected


@pytest.mark.parametrize(
    ("prompt", "lead"),
    [
        ('<tool_call>\n{"name": 1}</tool_call> <tool_call>{"name": 2}</tool_call>', ""),
        ('<tool_call> {"name": 1}</tool_call> inside <tool_call></tool_call>', " "),
        ("say <tool_call>x", "\n"),
    ],
)
def test_a_call_begins_as_the_newest_one_of_the_prompt_did(vocabulary: Vocabulary, prompt: str, lead: str) -> None:
    assert follow(vocabulary, "<tool_call>", prompt=prompt) == lead + BEGUN
    assert follow(vocabulary, "<tool_", prompt=prompt) == f"call>{lead}{BEGUN}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{", '"name": "get_weather", "parameters": {"city": "'),
        ('{"name":', ' "get_weather", "parameters": {"city": "'),
        ('{"name": "get_t', 'ime", "parameters": {"zone": "'),
        ("<|python_tag|>", '{"name": "get_weather", "parameters": {"city": "'),
        ('{"city"', ""),
    ],
)
def test_a_marker_that_is_the_call_s_own_beginning(vocabulary: Vocabulary, written: str, expected: str) -> None:
    spans = [Span(kind=span.kind, begin=span.begin, end=span.end) for span in LLAMA3]
    tools = carried_tools(FUNCTIONS, "llama3") or ""
    assert follow(vocabulary, written, spans=spans, tools=tools, prompt='<|python_tag|>{"name": "sing"}') == expected


THOUGHTS = Span(kind="reasoning", begin="<think>", end="</think>")
OPEN = f"<tool_call>\n{BEGUN}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", OPEN),
        ("\n", OPEN),
        ("No", ""),
        ("<think>A", ""),
        ("<think>A</think>", f"\n\n{OPEN}"),
        ("<think>A</think>\n", f"\n{OPEN}"),
        ("<think>A</think> ", OPEN),
        ("<think>A</think>\n\nNo", ""),
        ("<think>A</thi", ""),
        ('<think>A</think>\n<tool_call>\n{"name": "sing", "arguments": {}}\n</tool_call>', ""),
    ],
)
def test_that_a_call_begins_is_guessed_where_one_may_begin(vocabulary: Vocabulary, written: str, expected: str) -> None:
    assert follow(vocabulary, written, spans=[*SPANS, THOUGHTS]) == expected


def test_it_is_not_guessed_while_the_prompt_s_reasoning_is_open(vocabulary: Vocabulary) -> None:
    spans = [*SPANS, THOUGHTS.model_copy(update={"open": True})]
    assert follow(vocabulary, "", spans=spans) == follow(vocabulary, "\n", spans=spans) == ""
    assert follow(vocabulary, "\nSo</think>", spans=spans) == f"\n\n{OPEN}"


def test_the_tool_that_the_conversation_used_most(vocabulary: Vocabulary) -> None:
    used = {"get_weather": 1, "get_time": 3, "sing": 1}
    assert follow(vocabulary, '<tool_call>\n{"name": "', used).startswith('get_time"')


def test_only_calls_of_known_forms_are_told_of_and_only_so_much() -> None:
    assert carried_tools(FUNCTIONS, "llama3") is not None
    assert carried_tools(FUNCTIONS, "qwen3_coder") is not None
    assert carried_tools(FUNCTIONS, "pythonic") is carried_tools(FUNCTIONS, None) is None
    assert carried_tools([("long", {"description": "x" * MAX_TOOLS_CHARS})], "hermes") is None
    assert carried_tools([("long", {"description": "\u5929" * (MAX_TOOLS_CHARS // 2)})], "hermes") is not None
    assert carried_tools([("half", {"description": "\ud800"})], "hermes") is None


@pytest.mark.parametrize(
    "tools",
    [
        "",
        "{",
        "3",
        "[1]",
        '["a", [1]]',
        '["a", [["f", {"type": 3}]]]',
        "[" * 5000,
        json.dumps(["a", [[None, 4]]]),
        json.dumps(["arguments", [["\ud800", None]]]),
        json.dumps(["arguments", [["f", {"properties": {"\udc00": {}}}]]]),
    ],
)
def test_what_nobody_of_ours_wrote_is_silently_left(vocabulary: Vocabulary, tools: str) -> None:
    """`custom_params` may hold anything."""
    Calls(tools, SPANS).follow('<tool_call>{"name')
    words_of_tools(tools)
    assert parse_hints({TOOLS_KEY: tools}).tools == tools
    assert parse_hints({TOOLS_KEY: 3}).tools == ""


def test_tools_that_nest_too_deep_are_not_carried() -> None:
    """The interpreter's writer of JSON gives up on them, and SGLang answers 400 by itself."""
    parameters: dict[str, Any] = {"type": "string"}
    for _ in range(50_000):
        parameters = {"type": "object", "properties": {"a": parameters}}
    assert carried_tools([("f", parameters)], "hermes") is None


def size(schema: object) -> int:
    """Schemas and listed values in a schema."""
    if not isinstance(schema, dict):
        return 0
    parts = [*schema.get("properties", {}).values(), *schema.get("anyOf", []), schema.get("items")]
    return 1 + len(schema.get("enum", [])) + sum(map(size, parts))


@pytest.mark.parametrize("parameters", WORST.values(), ids=WORST.keys())
def test_a_clients_schema_does_not_decide_how_long_its_grammar_takes(parameters: dict[str, Any]) -> None:
    essence = Essence()
    found = [essence.of(parameters) for _ in range(9)]
    assert sum(map(size, found)) <= 2 * MOST_NODES
    assert not {"pattern", "minProperties", "allOf", "minItems"} & set(re.findall(r'"(\w+)":', json.dumps(found)))
    tools = json.dumps(["arguments", [["find", parameters], ["other", {}]]])
    assert compiled(tools) is not None
    Calls(tools, SPANS).follow('<tool_call>{"name": "ot')


def test_neither_many_tools_nor_long_names_are_compiled() -> None:
    many: list[tuple[str | None, Any]] = [(f"f{i}", None) for i in range(MOST_FUNCTIONS + 1)]
    assert carried_tools(many, "hermes") is None
    assert carried_tools(many[1:], "hermes")
    long = "x" * MOST_NAMED_CHARS
    assert Essence().of({"properties": {"city": {}, long: {}, "unit": {}}}) == {"properties": {"city": {}}}
    assert compiled(json.dumps(["arguments", [[f"{long}x", None]]])) is None


def test_equal_tools_share_one_grammar_and_few_are_kept() -> None:
    assert compiled(TOOLS) is compiled(str(TOOLS))
    for number in range(KEPT + 20):
        compiled(json.dumps(["arguments", [[f"tool_{number}", None]]]))
    assert compiled.cache_info().currsize == KEPT


def test_kinds_have_a_seed() -> None:
    assert len(SEED) == len(Kind)


def test_what_tools_tell_is_proposed_only_as_far_as_the_grammar_allows_it(
    grammars: Grammars, vocabulary: Vocabulary
) -> None:
    """As for a forced call of a tool that is not strict: the grammar is another one than the tools'."""
    guesses = Guesses(words_of_tools(TOOLS), lambda text: 0)
    for count in (1, 2, 3):
        written = ['{"name"', ': "get_time"', ', "arguments": {"zone": "'][:count]
        schema = {"const": {"name": "get_time", "arguments": {"city": 1}}}
        separators = (", ", ": ") if grammars.engine == "xgrammar" else (",", ":")
        document = json.dumps(schema["const"], separators=separators)
        raw, judge = (grammars.raw(schema, blanks=False) for _ in range(2))
        longer = SPANS[0].model_copy(update={"end": "</tool_call> and more text than the grammar has"})
        calls = Calls(TOOLS, [longer])
        calls.follow("<tool_call>" + "".join(written))
        beginning = vocabulary.encode(document)[:4]
        for engine in (raw, judge):
            for token in beginning:
                grammars.accept(engine, token)
        grammar: dict[str, Any] = {"matcher": grammars.matcher(raw, vocabulary), "layout": Layout(), "guesses": guesses}
        alone, found = (
            sketch(vocabulary, beginning, 64, **grammar, calls=told, end=grammars.end) for told in (None, calls)
        )
        assert len(found) >= len(alone) > 0, "what the grammar tells is lost for text that it forbids"
        tokens = [token.token for token in found]
        assert not grammars.forbidden(judge, tokens), "a draft that the grammar forbids"
