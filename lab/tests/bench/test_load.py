"""An answer and its times are read of a stream."""

import json

import pytest

from whiflash_lab.bench.load import RequestError, parse_stream
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Reference


def data(event: dict[str, object]) -> str:
    return "data: " + json.dumps(event)


def choice(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}}]}


END: dict[str, object] = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


def ids(*tokens: int, **details: object) -> dict[str, object]:
    return {"choices": [], "sglext": {"output_ids": [list(tokens)], **details}}


def test_times_and_forwards_of_a_stream() -> None:
    lines = [
        (0.10, data(choice(""))),
        (0.10, ""),
        (0.30, data(choice("ab"))),
        (0.50, data(END)),
        (0.60, data(ids(5, 6, 7, 8, 9, spec_tokens_details={"spec_verify_ct": 2}))),
        (0.70, "data: [DONE]"),
    ]
    answer = parse_stream("p", lines)
    assert (answer.ttft, answer.seconds, answer.tokens, answer.forwards) == (0.1, 0.5, (5, 6, 7, 8, 9), 2)
    assert answer.tpot == pytest.approx(0.1)
    plain = parse_stream("p", [(0.1, data(END)), (0.2, data(ids(1, 2, 3)))])
    assert plain.forwards == 2, "plain decoding makes a forward a token"
    single = parse_stream("p", [(0.1, data(END)), (0.2, data(ids(1)))])
    assert (single.forwards, single.tpot) == (0, None)


def test_a_message_is_put_together_for_the_next_turn() -> None:
    """Without its reasoning, whose loop is one of the answer."""
    pieces: list[dict[str, object]] = [
        {"reasoning_content": "so on " * 30, "reasoning": "so on " * 30},
        {"content": "Lo"},
        {"content": "ok", "tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]},
        {"tool_calls": [{"index": 1, "id": "d", "function": {"name": "g", "arguments": "[]"}}]},
        {"tool_calls": [{"index": 0, "function": {"name": None, "arguments": "}"}}]},
    ]
    lines = [
        data({"choices": [{"delta": piece, "finish_reason": "stop"}], "usage": {"completion_tokens": 9}})
        for piece in pieces
    ]
    whole = parse_stream("p", [(0.1, line) for line in lines])
    functions = [{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": "[]"}]
    assert [(call["id"], call["function"]) for call in whole.calls] == [*zip("cd", functions, strict=True)]
    looping = parse_stream("p", [(0.1, lines[0])])
    found = [Reference(Prompt("p", "chat", ()), (), one.tokens, (), "").loops for one in (whole, looping)]
    assert (whole.text, looping.text, found) == ("Look", "", [False, True])


@pytest.mark.parametrize(
    "lines", [[], [(0.1, data(choice("a")))], [(0.1, data(END))], [(0.1, data({"error": {"message": "no"}}))]]
)
def test_a_broken_stream_is_an_error(lines: list[tuple[float, str]]) -> None:
    with pytest.raises(RequestError, match="prompt p"):
        parse_stream("p", lines)
