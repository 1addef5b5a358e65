"""AgentSpec's fields of a body become hints, or are refused by their own names."""

from typing import Any

import pytest

from whiflash_sglang.spans.carrier import add_body_scope
from whiflash_sglang.spans.hints import Block, HintError, RequestHints, parse_hints

SENT = {"agent-id": "coder", "query-id": 2, "structure": [["<code>", "</code>"]]}
OURS = {"whiflash": '{"trace":true}'}


def test_the_published_names_become_hints() -> None:
    params = add_body_scope({**OURS, "mine": 1}, {"messages": [], **SENT})
    assert params is not None
    assert params["mine"] == 1
    expected = RequestHints(
        trace="summary", agent="coder", query="2", structure=(Block("<code>", "</code>"),)
    )
    assert parse_hints(params) == expected
    assert parse_hints(add_body_scope(None, {"agent-id": "a"})) == RequestHints(agent="a")


@pytest.mark.parametrize("body", [{}, {"structure": 7}, {"agent-id": None, "query-id": {}}, [], None])
def test_a_body_without_an_agent_says_nothing(body: object) -> None:
    assert add_body_scope(OURS, body) is OURS
    assert add_body_scope(None, body) is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"agent-id": 7}, "agent-id"),
        ({"agent-id": "a", "query-id": []}, "query-id"),
        ({"agent-id": "a", "structure": [["x"]]}, "structure[0]"),
        ({"agent-id": "a", "structure": [["x", 3]]}, "structure[0][1]"),
    ],
)
def test_a_malformed_field_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(HintError) as caught:
        add_body_scope(None, body)
    assert caught.value.field == field


def test_one_thing_is_said_once() -> None:
    with pytest.raises(HintError, match=r"^agent-id: given twice, also as custom_params\.whiflash\.agent"):
        add_body_scope({"whiflash": '{"agent":"b"}'}, SENT)
    with pytest.raises(HintError, match=r"^custom_params\.whiflash\.off"):
        add_body_scope({"whiflash": '{"off":1}'}, SENT)


def test_hints_that_grow_too_long_are_refused() -> None:
    padded = {"whiflash": '{"trace":true' + " " * 8100 + "}"}
    assert parse_hints(add_body_scope(padded, SENT)).agent == "coder", "spaces are not carried on"
    long = {"whiflash": '{"spans":[' + ",".join(['{"kind":"code","begin":"' + "é" * 64 + '"}'] * 16) + "]}"}
    blocks = [["\U0001f600" * 64, "\U0001f600" * 64]] * 16
    with pytest.raises(HintError, match="longer than 8192 bytes"):
        add_body_scope(long, {**SENT, "structure": blocks})
