"""OpenTelemetry spans of SGLang's (`--enable-trace`): they say who drafted, and answers stay as they are."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from patience import wait_until
from server_host import Server, ServerHost
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

pytestmark = pytest.mark.server

Attributes = dict[str, Any]


class Collector:
    """What an OpenTelemetry collector is sent: attributes of every span, by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Attributes] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest.FromString(
                    self.rfile.read(int(self.headers["Content-Length"]))
                )
                for resource in sent.resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(map(_attributes, scope.spans))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def of(self, request: str) -> Attributes:
        """Of the span that ended `request`, as soon as it is there."""

        def found() -> list[Attributes]:
            return [span for span in self.spans if span.get("gen_ai.request.id") == request]

        wait_until(lambda: bool(found()))
        return found()[0]


def _attributes(span: Any) -> Attributes:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, host: ServerHost, collector: Collector
) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("checkpoints")
    target = tiny_target(root / "target", peaked=True)
    arguments = ["--model-path", target, "--dtype", "float32", "--speculative-algorithm", "WHIFLASH"]
    arguments += ["--whiflash-eagle-draft", tiny_eagle3(root / "e", target), "--whiflash-router", "random"]
    arguments += ["--speculative-draft-model-path", tiny_dflash(root / "d", target)]
    arguments += ["--enable-trace", "--otlp-traces-endpoint", collector.endpoint]
    protocol = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with host.running(*map(str, arguments), env=protocol) as running:
        yield running


def test_a_span_tells_who_drafted(server: Server, collector: Collector) -> None:
    prompt = {"input_ids": [5, 6, 7] * 6, "sampling_params": {"temperature": 0, "max_new_tokens": 40}}
    asking = {"custom_params": {"whiflash": '{"trace":"summary"}'}}
    answers = server.generate_all(
        [
            {**prompt, "rid": "untraced"},
            {**prompt, "rid": "asking", "sampling_params": {**prompt["sampling_params"], **asking}},  # type: ignore[dict-item]
        ],
        concurrency=2,
    )
    quiet, told = (answer["meta_info"] for answer in answers)
    assert "whiflash" not in quiet
    summary = told["whiflash"]
    span = collector.of("asking")
    assert span["whiflash.policy"] == "random"
    assert (span["whiflash.rounds"], span["whiflash.switches"]) == (summary["rounds"], summary["switches"])
    for arm, counts in summary["arms"].items():
        assert {name: span[f"whiflash.arm.{arm}.{name}"] for name in counts} == counts
    # Who did not ask has a span as well, and no part of it in the answer.
    other = collector.of("untraced")
    arms = {key.split(".")[2] for key in other if key.startswith("whiflash.arm.")}
    assert sum(other[f"whiflash.arm.{arm}.tokens"] for arm in arms) == quiet["completion_tokens"] - 1
