"""The grammars of prompts are the server's."""

import json

import pytest

from whiflash_train.answers.prompts import response_format_grammar, tool_call_grammar

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop", "strict": True, "parameters": {"type": "object"}}},
]


def test_response_formats() -> None:
    assert response_format_grammar({"type": "text"}) is None
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert response_format_grammar(named) == {"json_schema": json.dumps(SCHEMA)}
    with pytest.raises(ValueError, match="one of text, json_object, json_schema"):
        response_format_grammar({"type": "xml"})


def test_a_tool_must_be_called_and_its_arguments_are_open_unless_it_is_strict() -> None:
    asked = json.loads((tool_call_grammar(TOOLS) or {})["structural_tag"])
    assert asked["at_least_one"]
    assert asked["triggers"] == ["<tool_call>"]
    assert [part["schema"] for part in asked["structures"]] == [{}, {"type": "object"}]
