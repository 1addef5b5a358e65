"""`routing` on everything that can carry a trace."""

from typing import Any

import pytest
from fake_server import ASKED, CAPABILITIES, EXPECTED, FULL, STRETCHES, TRACE, FakeServer
from openai import OpenAI

from whiflash_sdk import Hints, SourceTotals, Trace, TraceError, routing, wrap


def test_the_trace_is_typed(client: OpenAI, server: FakeServer) -> None:
    server.trace = FULL
    trace = routing(wrap(client, trace="full").chat.completions.create(**ASKED))
    assert isinstance(trace, Trace)
    assert (trace.policy, trace.switches, trace.rounds, trace.tokens) == ("auto", 1, 3, 14)
    assert trace.acceptance_length == pytest.approx(14 / 3)
    assert [(s.arm, s.tokens, s.acceptance_length, s.span, s.proposed) for s in trace.stretches] == [
        ("ar", 6, 3.0, None, 8),
        ("lookup", 8, 8.0, "json", 9),
    ]
    assert trace.arms["lookup"].acceptance_length == 8.0
    assert (trace.arms["ar"].accepted, trace.arms["ar"].proposed) == (4, 8)
    assert trace.reasons == {"score": 2, "span": 1}
    assert trace.text == server.content, "the response has the text, so the server sends it once"


def test_sources_are_typed_and_absent_where_a_server_of_before_has_none(client: OpenAI, server: FakeServer) -> None:
    found = {"prediction": {"proposed": 12, "accepted": 7, "saved": 0.25}, "form": {"proposed": 1, "accepted": 0}}
    server.trace = {**FULL, "sources": found}
    trace = routing(wrap(client).chat.completions.create(**ASKED))
    assert trace is not None
    assert trace.sources["prediction"] == SourceTotals(proposed=12, accepted=7, saved=0.25)
    assert trace.sources["form"].saved is None
    before = Trace.model_validate(TRACE)
    assert (before.sources, before.arms["ar"].saved) == ({}, None)


def test_raw_responses_completions_and_json_carry_it_too(client: OpenAI) -> None:
    wrap(client)
    raw = client.chat.completions.with_raw_response.create(**ASKED)
    text = client.completions.create(model="m", prompt="x")
    assert routing(raw) == routing(text) == routing(text.model_dump()) == EXPECTED
    assert routing({"text": "x", "meta_info": {"whiflash": TRACE}}) == EXPECTED
    own = routing({"text": "x" * 20, "meta_info": {"whiflash": {**FULL, "text": "generated"}}})
    assert own is not None
    assert own.text == "generated", "a text that the server sends is kept"
    item = {"text": "x" * 20, "meta_info": {"whiflash": {**FULL, "choice": 1}}}  # the second of a batch
    full = routing(item)
    assert full is not None
    assert full.text == "x" * 20
    batch = [{"text": "x", "meta_info": {"whiflash": TRACE}}, item]
    assert [routing(batch), routing(batch, 1)] == [EXPECTED, full]


@pytest.mark.parametrize(("given", "sent"), [(True, True), ("full", "full"), (False, False)])
def test_the_level_goes_out(client: OpenAI, server: FakeServer, given: Any, sent: Any) -> None:
    wrap(client, trace=given).chat.completions.create(**ASKED)
    asked = {**ASKED, "extra_body": Hints(trace=given).extra_body()}
    wrap(client.with_options(), trace=False).chat.completions.create(**asked)
    assert [server.wire(index)["trace"] for index in range(2)] == [sent, sent]


def test_fields_of_a_later_server_are_ignored(client: OpenAI, server: FakeServer) -> None:
    server.capabilities = {**CAPABILITIES, "policy": "later"}
    server.trace = {**FULL, "new": 1, "stretches": [{**STRETCHES[0], "new": {}}]}
    trace = routing(wrap(client, trace="full").chat.completions.create(**ASKED))
    assert trace is not None
    assert len(trace.stretches) == 1


def test_choices_have_traces_of_their_own(client: OpenAI, server: FakeServer) -> None:
    server.trace = [{**TRACE, "choice": 1, "policy": "entropy"}, TRACE]
    response = wrap(client).chat.completions.create(**ASKED, n=2)
    found = [routing(response, choice) for choice in range(3)]
    assert [trace and trace.policy for trace in found] == ["auto", "entropy", None]


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {**TRACE, "version": 2},
        {**TRACE, "rounds": -1},
        {**TRACE, "stretches": [{}]},
        {**TRACE, "stretches": [{**STRETCHES[0], "chars": [-1, 2]}]},
        "text",
        3,
    ],
)
def test_a_broken_trace_is_named(client: OpenAI, server: FakeServer, broken: Any) -> None:
    server.trace = broken
    response = wrap(client).chat.completions.create(**ASKED)
    with pytest.raises(TraceError, match="trace"):
        routing(response)


@pytest.mark.parametrize("response", [None, {}, {"sglext": None}, {"sglext": {}}, {"meta_info": {"id": 1}}, "x"])
def test_no_trace_is_none(response: object) -> None:
    assert routing(response) is None
