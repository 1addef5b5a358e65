"""OpenInference with the OpenTelemetry SDK: its spans stay, and get what an answer came to, in both orders."""

from typing import Any

import pytest
from fake_server import ASKED, FakeServer
from openai import OpenAI

import whiflash_sdk

openinference = pytest.importorskip("openinference.instrumentation.openai")
sdk = pytest.importorskip("opentelemetry.sdk.trace")
exporting = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")


def made(server: FakeServer, *, below: bool) -> OpenAI:
    told: Any = {"base_url": server.base_url, "api_key": "key", "timeout": None}
    if below:
        return OpenAI(**told, http_client=whiflash_sdk.http_client(agent="planner"))
    return whiflash_sdk.wrap(OpenAI(**told), agent="planner")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("instrumented_first", [False, True])
def test_spans_are_kept_and_completed(server: FakeServer, instrumented_first: bool, below: bool, stream: bool) -> None:
    """Below a client its own span gets the figures; with `wrap`, the one around it, as the tracer's opens below."""
    exporter = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(exporting.SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    instrumentor = openinference.OpenAIInstrumentor()
    client = None if instrumented_first else made(server, below=below)
    instrumentor.instrument(tracer_provider=provider)
    try:
        client = client or made(server, below=below)
        with tracer.start_as_current_span("agent"):
            answer = client.chat.completions.create(**ASKED, stream=stream)
            if stream:
                assert "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        assert whiflash_sdk.routing(answer) is not None
    finally:
        instrumentor.uninstrument()
    spans = {span.name: dict(span.attributes) for span in exporter.get_finished_spans()}
    agent = spans.pop("agent")
    [of_tracer] = (found for found in spans.values() if found.get("openinference.span.kind") == "LLM")
    assert of_tracer["llm.model_name"] == "m"
    figures = of_tracer if below else agent
    assert (figures["whiflash.tokens"], figures["gen_ai.agent.name"]) == (14, "planner")
