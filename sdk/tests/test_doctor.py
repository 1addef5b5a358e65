"""`doctor`: every reason for which hints have no effect has a finding that names it and what would help."""

from typing import Any

import pytest
from fake_server import CAPABILITIES, TRACE, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Hints, async_doctor, doctor, explain, http_client, wrap


def failing(client: OpenAI, model: str | None = None) -> dict[str, str]:
    return {finding.name: finding.detail for finding in doctor(client, model) if not finding.ok}


def test_nothing_is_wrong(client: OpenAI, server: FakeServer) -> None:
    server.capabilities["arms"] = ["uno", "lookup", "structure", "none"]
    found = doctor(wrap(client))
    assert all(finding.ok for finding in found)
    assert str(found[0]) == "ok   client: it sends hints"
    assert str(found[1]) == "ok   server: whiflash-sglang 0.1.0, policy auto"


@pytest.mark.parametrize(
    ("fields", "name", "said"),
    [
        ({"arms": ["ar", "structure", "none"]}, "copies", "--whiflash-lookup off"),
        ({"arms": ["ar", "lookup", "none"]}, "structure", "--whiflash-structure off"),
        ({"arms": ["lookup", "structure", "none"]}, "drafters", "loaded none"),
        ({"prediction_tokens": 0}, "predictions", "leave them out"),
        ({"tool_call_parser": None}, "tool calls", "--tool-call-parser"),
        ({"tool_call_parser": "of_tomorrow"}, "tool calls", "Hints(spans=…)"),
        ({"version": 2}, "server", "whiflash serve"),
        ({"tenant_header": True}, "tenant", "X-WhiFlash-Tenant"),
        ({"sessions": False}, "sessions", "--enable-session-radix-cache"),
    ],
)
def test_what_the_server_lacks_is_named(
    client: OpenAI, server: FakeServer, fields: dict[str, Any], name: str, said: str
) -> None:
    server.capabilities = {**CAPABILITIES, "arms": ["ar", "lookup", "structure", "none"], **fields}
    found = failing(wrap(client))
    assert list(found) == [name]
    assert said in found[name]


def test_a_client_that_sends_none_is_named(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "wrap(client)" in failing(client)["client"]
    assert "off=True" in failing(wrap(client.with_options(), hints=Hints(off=True)))["client"]
    below = OpenAI(base_url=client.base_url, api_key="k", http_client=http_client())
    assert doctor(below)[0].ok
    assert "capabilities" in failing(wrap(client.with_options(), capabilities=True))["server"]
    monkeypatch.setenv("WHIFLASH_SDK_DISABLE", "1")
    assert "WHIFLASH_SDK_DISABLE" in failing(wrap(client))["client"]


def test_another_model_behind_a_gateway_is_named(client: OpenAI, server: FakeServer) -> None:
    server.models = ["tiny", "other"]
    assert "model" not in failing(wrap(client), "tiny")
    said = failing(wrap(client), "other")["model"]
    assert said == "the server answers for 'tiny', and requests for 'other' go elsewhere: ask for 'tiny'"


def test_async_clients_too(async_client: AsyncOpenAI, ran: Any) -> None:
    found = ran(async_doctor(wrap(async_client)))
    assert [finding.name for finding in found if not finding.ok] == ["structure"]


TOLD: dict[str, Any] = {
    **TRACE,
    "sources": {
        "ar": {"proposed": 8, "accepted": 4},
        "prediction": {"proposed": 9, "accepted": 7, "saved": 0.25},
        "tools": {"proposed": 16, "accepted": 0},
        "history": {"proposed": 3, "accepted": 0},
    },
}


def explained(trace: Any) -> dict[str, str]:
    return {finding.name: str(finding) for finding in explain({"sglext": {"whiflash": trace}})}


def test_an_answer_shows_what_each_hint_brought() -> None:
    found = explained(TOLD)
    assert found["trace"] == "ok   trace: policy auto, acceptance length 4.67"
    assert found["drafts"] == "ok   drafts: 3 of 3 rounds drafted"
    assert found["spans"].startswith("ok   spans: 1 of 3")
    assert found["prediction"] == "ok   prediction: 7 of 9 drafts accepted, 0.250 s saved by estimate"
    assert found["tools"] == "FAIL tools: 0 of 16 drafts accepted"
    assert found["history"] == "-    history: 0 of 3 drafts accepted"


@pytest.mark.parametrize(
    ("trace", "name", "said"),
    [
        ({**TOLD, "notes": ["the prediction was cut"]}, "request", "was cut"),
        ({**TOLD, "sources": {}}, "sources", "reports none"),
        ({**TOLD, "arms": {"none": {"rounds": 3, "tokens": 3}}}, "drafts", "0 of 3 rounds"),
        ({**TOLD, "arms": {"none": {"rounds": 3, "tokens": 3}}, "reasons": {"off": 3}}, "drafts", "off=True"),
        ({**TOLD, "sources": {"tools": {"proposed": 0, "accepted": 0}}}, "tools", "0 of 0"),
        ({**TOLD, "rounds": 0, "tokens": 0, "arms": {}, "sources": {}}, "drafts", "0 of 0"),
        ({**TOLD, "rounds": 0, "tokens": 0, "arms": {}, "sources": {}}, "sources", "reports none"),
    ],
)
def test_an_answer_shows_why_nothing_came(trace: Any, name: str, said: str) -> None:
    assert explained(trace)[name].startswith("-" if "0 of 0" in said or not trace["rounds"] else "FAIL")
    assert said in explained(trace)[name]
    assert ("doctor(client)" in explained(trace)[name]) is ("of 3 rounds" in said)


def test_an_answer_without_a_trace_is_explained(client: OpenAI, server: FakeServer) -> None:
    server.trace = None
    (finding,) = explain(wrap(client).completions.create(model="m", prompt="x"))
    assert not finding.ok
    assert "sglext" in finding.detail
