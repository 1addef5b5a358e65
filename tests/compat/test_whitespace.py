"""Whitespace in the grammar of tool calls, judged by the grammar itself."""

import json
from typing import Any

import pytest
import xgrammar
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

from whiflash_sglang.compat.scheduler import whitespace

SCHEMA = {
    "type": "object",
    "properties": {"json_schema": {"type": "string", "enum": ["a", "b"]}},
    "required": ["json_schema"],
    "additionalProperties": False,
}
LEGACY = {
    "type": "structural_tag",
    "structures": [{"begin": "<t>", "schema": SCHEMA, "end": "</t>"}],
    "triggers": ["<t>"],
    "at_least_one": True,
}
CONTENT = {"type": "json_schema", "json_schema": SCHEMA}
MODERN = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<t>", "content": CONTENT, "end": "</t>"},
}


class Tokenizer:
    """One token a byte."""

    def init_xgrammar(self) -> tuple[Any, None]:
        vocabulary = [bytes((byte,)) for byte in range(256)]
        return xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, stop_token_ids=[0]), None


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine runs here that could say whose it is."""
    monkeypatch.setattr(whitespace, "serves_ours", lambda: True)


def accepts(tag: dict[str, Any], text: str, **bounds: Any) -> bool:
    """Whether SGLang's backend lets the model write `text`, as far as it goes."""
    whitespace.install()
    grammar = XGrammarGrammarBackend(Tokenizer(), 256, **bounds).dispatch_structural_tag(json.dumps(tag))
    return bool(grammar.matcher.accept_string(text))


@pytest.mark.parametrize("tag", [LEGACY, MODERN], ids=["legacy", "modern"])
@pytest.mark.parametrize(
    ("text", "free", "compact"),
    [
        ('<t>{"json_schema": "a"}</t>', True, True),
        ('<t>{"json_schema":"b"}</t>', True, True),
        ('<t>{ "json_schema" : "b" }</t>', True, True),
        ('<t>{"json_schema":  "b"}</t>', True, False),
        ("<t>{\n\n\n\n", True, False),
        ('<t>{"other": 1}</t>', False, False),
        ("no call", False, False),
    ],
)
def test_the_flags_of_json_hold_for_tool_calls(
    tag: dict[str, Any], text: str, free: bool, compact: bool
) -> None:
    assert accepts(tag, text) is free
    assert accepts(tag, text, any_whitespace=False) is compact
    assert accepts(tag, text, max_whitespace_cnt=1) is compact
    assert accepts(tag, text, max_whitespace_cnt=9) is free


def test_a_schema_is_data_and_a_bound_of_the_users_own_stays() -> None:
    named = {"type": "json_schema", "properties": {"type": "json_schema"}}
    content = {"type": "json_schema", "json_schema": named, "max_whitespace_cnt": 5}
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": [content]}}
    assert json.loads(whitespace.bounded_tag(json.dumps(tag), 1)) == tag


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '{"format": null}', '{"structures": []}'])
def test_what_is_no_tag_is_left_to_the_engine(text: str) -> None:
    try:
        expected = json.loads(text)
    except json.JSONDecodeError:
        assert whitespace.bounded_tag(text, 1) == text
    else:
        assert json.loads(whitespace.bounded_tag(text, 1)) == expected


def test_another_algorithms_grammars_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitespace, "serves_ours", lambda: False)
    text = '<t>{"json_schema":  "b"}</t>'
    assert accepts(MODERN, text, any_whitespace=True, max_whitespace_cnt=1)
