"""`Collected.report`: sums by agent, tool, turn and drafter, as objects, text and page."""

from typing import Any

import pytest
from fake_server import ASKED, TRACE, FakeServer
from openai import OpenAI

from whiflash_sdk import Report, Share, agent, collect, wrap

SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "function": {"name": "calculator", "parameters": SCHEMA}}]
PRICED = {**TRACE, "seconds": 0.5, "arms": {name: {**arm, "saved": 0.25} for name, arm in TRACE["arms"].items()}}


@pytest.fixture
def report(client: OpenAI, server: FakeServer) -> Report:
    """Report of five turns of two agents: the planner calls a tool twice, once in a stream, and answers three times."""
    server.trace = PRICED
    wrap(client)
    with collect() as collected:
        with agent("planner"):
            client.chat.completions.create(**ASKED, tools=TOOLS)
            list(client.chat.completions.create(**ASKED, tools=TOOLS, stream=True))
        client.chat.completions.create(**ASKED)
        with agent("<b>writer</b>"):
            for _ in range(2):
                client.completions.create(model="m", prompt="x")
    return collected.report()


def rows(shares: tuple[Share, ...]) -> dict[str, int]:
    return {share.name: share.answers for share in shares}


def test_every_answer_is_in_one_row_of_each_table(report: Report) -> None:
    assert rows(report.agents) == {"planner": 2, "<b>writer</b>": 2, "no agent": 1}
    assert rows(report.tools) == {"text only": 3, "calculator": 2}
    assert [turn.name for turn in report.turns][::3] == ["1. planner: calculator", "4. <b>writer</b>: text only"]
    for shares in (report.agents, report.tools, report.turns):
        for name in ("answers", "rounds", "tokens", "seconds", "saved"):
            assert sum(getattr(share, name) for share in shares) == getattr(report.total, name)


def test_sums_are_those_of_the_traces(report: Report) -> None:
    total = report.total
    assert (total.answers, total.rounds, total.tokens) == (5, 15, 70)
    assert (total.seconds, total.saved) == (2.5, 2.5)
    assert total.acceptance_length == pytest.approx(70 / 15)
    lookup = total.arms["lookup"]
    assert (lookup.rounds, lookup.tokens, lookup.proposed, lookup.accepted, lookup.saved) == (5, 40, 45, 35, 1.25)


def test_a_report_is_data(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_report_is_text_and_a_page_that_runs_nothing(report: Report) -> None:
    text, page = str(report), report.html()
    assert "5 answers; estimated time saved by the server's own prices" in text
    figures = "calculator        2      28       6               4.67    1.00 s    1.00 s  lookup 8.00 · ar 3.00"
    assert figures in text.splitlines()
    heads = [line for line in text.splitlines() if "saved" in line][1:]
    assert [line.split()[0] for line in heads] == ["Agent", "Tool", "Turn", "Drafter"]
    assert "&lt;b&gt;writer" in page
    assert "<b>writer" not in page
    assert "<script" not in page
    # Agents, tools, turns, and all in each.
    assert page.count('<td class="wide">lookup 8.00 · ar 3.00</td>') == 3 + 2 + 5 + 3


def test_what_nobody_knows_is_left_out(client: OpenAI) -> None:
    wrap(client)
    with collect() as collected:
        assert "0 answers" in str(collected.report())
        assert "</html>" in collected.report().html()
        client.chat.completions.create(**ASKED)
    report = collected.report()
    assert (report.total.seconds, report.total.saved) == (None, None)
    assert "no time saved is known, since the server has timed too few" in str(report)
    assert " s\n" not in str(report)
    assert "an estimate" not in report.html()


def test_spans_get_what_a_call_came_to(client: OpenAI, server: FakeServer) -> None:
    """The span that is current as the call begins, a stream's once it was read; those that do not record get none."""
    sdk, memory = (
        pytest.importorskip(f"opentelemetry.sdk.trace{name}") for name in ("", ".export.in_memory_span_exporter")
    )
    exporting = pytest.importorskip("opentelemetry.sdk.trace.export")
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(exporting.SimpleSpanProcessor(exporter))
    server.trace = PRICED
    tracer = provider.get_tracer("test")
    wrap(client, agent="planner")
    client.chat.completions.create(**ASKED)
    call: Any = {"kind": pytest.importorskip("opentelemetry.trace").SpanKind.CLIENT}
    with tracer.start_as_current_span("chat m", **call):
        client.chat.completions.create(**ASKED)
    with tracer.start_as_current_span("stream", **call):
        list(client.chat.completions.create(**ASKED, stream=True))
    server.trace = {"version": "x"}
    with tracer.start_as_current_span("broken"):
        client.chat.completions.create(**ASKED)
    server.trace = PRICED
    own = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "orchestrator"}
    with tracer.start_as_current_span("POST /run") as around, tracer.start_as_current_span("agent", attributes=own):
        for more in (0, -5, 5):
            server.trace = {**PRICED, "tokens": PRICED["tokens"] + more}
            client.chat.completions.create(**ASKED)
        late = client.chat.completions.create(**ASKED, stream=True)
    assert not around.attributes
    list(late)
    whole, stream, broken, agent, _ = (dict(span.attributes) for span in exporter.get_finished_spans())
    assert {name: agent.pop(name) for name in own} == own
    assert agent.pop("whiflash.acceptance_length") == pytest.approx(14 / 3)
    assert agent == {name: 3 * value for name, value in whole.items() if "gen_ai" not in name and "length" not in name}
    assert whole == stream
    assert broken == {}
    assert whole == {
        "gen_ai.response.id": "r0",
        "gen_ai.response.model": "m",
        "gen_ai.agent.name": "planner",
        "whiflash.rounds": 3,
        "whiflash.tokens": 14,
        "whiflash.acceptance_length": pytest.approx(14 / 3),
        "whiflash.seconds": 0.5,
        "whiflash.seconds_saved_estimate": 0.5,
        **{
            f"whiflash.arm.{arm}.{name}": value
            for arm, totals in TRACE["arms"].items()
            for name, value in totals.items()
        },
    }
