"""A small HTTP server that answers as OpenAI's and SGLang's routes do, and keeps what it was asked."""

import functools
import gzip
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from whiflash_sdk import Trace
from whiflash_sdk.hints import decode

ASKED: Any = {"model": "m", "messages": [{"role": "user", "content": "Where?"}]}
ROUTE = "/whiflash/capabilities"
ROUTES = ["chat/completions", "completions", "messages", "responses"]

TRACE: dict[str, Any] = {
    "version": 1,
    "policy": "auto",
    "choice": 0,
    "rounds": 3,
    "tokens": 14,
    "switches": 1,
    "arms": {
        "ar": {"rounds": 2, "tokens": 6, "proposed": 8, "accepted": 4},
        "lookup": {"rounds": 1, "tokens": 8, "proposed": 9, "accepted": 7},
    },
    "reasons": {"score": 2, "span": 1},
}

_OF_AR = {"arm": "ar", "rounds": 2, "proposed": 8, "accepted": 4, "reason": "score"}
_OF_COPIES = {"arm": "lookup", "rounds": 1, "proposed": 9, "accepted": 7, "reason": "span", "span": "json"}
STRETCHES: list[dict[str, Any]] = [
    {"start": 1, "end": 7, "chars": [1, 9], **_OF_AR},
    {"start": 7, "end": 15, "chars": [9, 18], **_OF_COPIES},
]
USAGE = {"prompt_tokens": 5, "completion_tokens": 15, "total_tokens": 20}
FULL: dict[str, Any] = {**TRACE, "stretches": STRETCHES}
EXPECTED = Trace.model_validate(TRACE)

CAPABILITIES: dict[str, Any] = {
    "version": 1,
    "server_version": "0.1.0",
    "model": "tiny",
    "policy": "auto",
    "arms": ["ar", "diffusion", "lookup", "none"],
    "prediction_tokens": 16384,
    "tool_call_parser": "hermes",
    "reasoning_parser": None,
    "sessions": True,
    "a_later_field": {"is": "ignored"},
}


def ask(client: Any, **more: Any) -> Any:
    """A chat completion."""
    return client.chat.completions.create(**{**ASKED, **more})


@contextmanager
def meanwhile(does: Callable[[], Any]) -> Iterator[None]:
    """Call a function at every step of the block that a profiler sees, as another thread may."""
    sys.setprofile(lambda *_: does())
    try:
        yield
    finally:
        sys.setprofile(None)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class FakeServer:
    """A server's answers, and the requests it saw, in order.

    capabilities: the document, or its bytes as they are. capabilities_key: requests without it are answered 401; empty
    takes everybody. capabilities_moved_to: where the route redirects to; empty answers itself. silent: while set, the
    capabilities route does not answer. models: what `/v1/models` lists; None: it fails. refuses: fields of which
    the server knows nothing; a request that has one is refused. refusal: its status and message.
    """

    url: str = ""
    capabilities: Any = field(default_factory=lambda: dict(CAPABILITIES))
    capabilities_status: int = 200
    capabilities_seconds: float = 0.0
    capabilities_key: str = ""
    capabilities_moved_to: str = ""
    silent: threading.Event = field(default_factory=threading.Event)
    trace: Any = field(default_factory=lambda: dict(TRACE))
    models: list[Any] | None = field(default_factory=lambda: ["tiny"])
    refuses: set[str] = field(default_factory=set)
    refusal: tuple[int, str] = (400, "Unrecognized request argument supplied: {field}")
    failures: int = 0
    usage_chunk: bool = False
    zipped: bool = False
    stream_kind: str = "text/event-stream"
    sets_cookies: bool = False
    content: str = '{"city": "Zürich"}'
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    closed: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        """Base URL for an OpenAI client."""
        return f"{self.url}/v1"

    def wire(self, index: int = -1) -> dict[str, Any]:
        """The hints of one completion request, as they were sent."""
        sent: dict[str, Any] = json.loads(self.bodies[index]["custom_params"]["whiflash"])
        return sent

    def said(self, name: str) -> list[Any]:
        """One hint of every request, as it was sent."""
        return [self.wire(index).get(name) for index in range(len(self.bodies))]

    def routed(self) -> list[bool]:
        """Requests that carried hints."""
        return ["whiflash" in body.get("custom_params", {}) for body in self.bodies]

    def hints(self, index: int = -1) -> dict[str, Any]:
        """The hints of one completion request, fields at their defaults left out."""
        return decode(self.bodies[index]["custom_params"]["whiflash"]).model_dump(mode="json", exclude_defaults=True)


def _message(server: FakeServer, body: dict[str, Any]) -> dict[str, Any]:
    tools = body.get("tools")
    if not tools or body["messages"][-1]["role"] == "tool" or body.get("tool_choice") == "none":
        return {"role": "assistant", "content": server.content}
    named = body.get("tool_choice")
    chosen = named if isinstance(named, dict) and "function" in named else tools[0]
    parameters = tools[0]["function"]["parameters"]["properties"].items()
    arguments = {name: 2 if spec.get("type") in ("integer", "number") else "2+2" for name, spec in parameters}
    call = {"name": chosen["function"]["name"], "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c0", "type": "function", "function": call}]}


def _traced(server: FakeServer) -> dict[str, Any]:
    return {} if server.trace is None else {"sglext": {"whiflash": server.trace}}


def _completion(server: FakeServer, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    said = {"message": _message(server, body)} if chat else {"text": server.content}
    reason = "tool_calls" if chat and "tool_calls" in said["message"] else "stop"
    choice = {"index": 0, **said, "finish_reason": reason, "logprobs": None}
    head = {"id": "r0", "created": 1, "model": body.get("model", "tiny"), "usage": USAGE}
    kind = "chat.completion" if chat else "text_completion"
    return {**head, "object": kind, "choices": [choice], **_traced(server)}


def _response(server: FakeServer, body: dict[str, Any], status: str = "completed") -> dict[str, Any]:
    content = [{"type": "output_text", "text": server.content, "annotations": []}]
    message = {"id": "m0", "type": "message", "role": "assistant", "status": status, "content": content}
    answer = {"id": "r0", "object": "response", "created_at": 1, "model": body["model"], "status": status}
    answer |= {"output": [message] if status == "completed" else [], "tools": [], "tool_choice": "auto"}
    return answer | (_traced(server) if status == "completed" else {})


def _response_events(server: FakeServer, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number, (name, status) in enumerate((("created", "in_progress"), ("completed", "completed"))):
        response = _response(server, body, status)
        yield {"type": f"response.{name}", "sequence_number": number, "response": response}


def _anthropic(server: FakeServer, body: dict[str, Any]) -> dict[str, Any]:
    """As SGLang converts a chat completion: a tool is called if one is offered."""
    called = {"type": "tool_use", "id": "c0", "name": "f", "input": {}}
    content = [called] if body.get("tools") else [{"type": "text", "text": server.content}]
    answer = {"id": "r0", "type": "message", "role": "assistant", "model": body["model"], "content": content}
    answer |= {"stop_reason": "end_turn", "usage": {"input_tokens": 5, "output_tokens": 15}}
    return answer | _traced(server)


def _anthropic_events(server: FakeServer, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    whole = _anthropic(server, body)
    extension = {name: whole.pop(name) for name in ("sglext",) if name in whole}
    (block,) = whole["content"]
    yield {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}}
    yield {
        "type": "content_block_start",
        "index": 0,
        "content_block": {**block, **({"text": ""} if "text" in block else {})},
    }
    if "text" in block:
        delta = {"type": "text_delta", "text": block["text"]}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 15}, **extension}
    yield {"type": "message_stop"}


def _chunks(server: FakeServer, body: dict[str, Any], *, chat: bool) -> Iterator[dict[str, Any]]:
    head = {"id": "r0", "created": 1, "model": body.get("model", "tiny")}
    head["object"] = "chat.completion.chunk" if chat else "text_completion"

    def chunk(reason: str | None = None, **said: Any) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "finish_reason": reason, "logprobs": None, **said}]}

    message = _message(server, body) if chat else {"content": server.content}
    for number, call in enumerate(message.get("tool_calls", [])):
        name, text = call["function"]["name"], call["function"]["arguments"]
        begun = {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": ""}}
        for piece in (begun, *({"function": {"arguments": part}} for part in (text[:4], text[4:]))):
            yield chunk(delta={"role": "assistant", "tool_calls": [{"index": number, **piece}]})
    for piece in (message["content"] or "").split(" "):
        yield chunk(delta={"role": "assistant", "content": f"{piece} "}) if chat else chunk(text=f"{piece} ")
    if chat:
        yield chunk("tool_calls" if "tool_calls" in message else "stop", delta={})
    if server.usage_chunk:
        yield {**head, "choices": [], "usage": USAGE}
    if server.trace is not None:
        yield {**head, "choices": [], **_traced(server)}


def _named(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\n" if "type" in event else ""


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            if server.zipped:
                body = gzip.compress(body, mtime=0)
                self.send_header("Content-Encoding", "gzip")
            if kind:
                self.send_header("Content-Type", kind)
            if server.sets_cookies:
                self.send_header("Set-Cookie", f"sticky={len(server.paths)}; Path=/")
            self.send_header("Content-Length", str(len(body)))
            with suppress(ConnectionError):  # the client did not wait
                self.end_headers()
                self.wfile.write(body)

        def do_GET(self) -> None:
            self.path = self.path.partition("?")[0]
            server.paths.append(self.path)
            if self.path == "/whiflash/capabilities":
                time.sleep(server.capabilities_seconds)
                while server.silent.is_set():
                    time.sleep(0.01)
                key = f"Bearer {server.capabilities_key}"
                if server.capabilities_key and self.headers.get("Authorization") != key:
                    return self._send(401, b"{}")
                if server.capabilities_moved_to:
                    self.send_response(307)
                    self.send_header("Location", server.capabilities_moved_to)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
            if self.path == "/whiflash/capabilities" and server.capabilities_status == 200:
                found = server.capabilities
                body = found if isinstance(found, bytes) else json.dumps(found).encode()
                self._send(200, body)
            elif self.path == "/v1/models":
                entries = ({"id": one} if isinstance(one, str) else one for one in server.models or ())
                listed = {"object": "list", "data": list(entries)}
                self._send(503 if server.models is None else 200, json.dumps(listed).encode())
            else:
                self._send(server.capabilities_status if server.capabilities_status != 200 else 404, b"{}")
            return None

        def do_POST(self) -> None:
            self.path = self.path.partition("?")[0]
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/close_session":
                server.closed.append(body | {"key": self.headers.get("Authorization")})
                return self._send(404 if "close" in server.refuses else 200, b"", "")
            server.paths.append(self.path)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            if refused := server.refuses & body.keys():
                status, message = server.refusal
                told = {"error": {"message": message.format(field=", ".join(sorted(refused)))}}
                self._send(status, json.dumps(told).encode())
            elif server.failures:
                server.failures -= 1
                self._send(503, b'{"error": {"message": "busy"}}')
            elif body.get("stream"):
                events = {"/v1/responses": _response_events, "/v1/messages": _anthropic_events}
                chunks = functools.partial(_chunks, chat=self.path.endswith("/chat/completions"))
                found = events.get(self.path, chunks)(server, body)
                lines = (_named(chunk) + f"data: {json.dumps(chunk)}\n\n" for chunk in found)
                end = "" if self.path == "/v1/messages" else "data: [DONE]\n\n"
                self._send(200, "".join([*lines, end]).encode(), server.stream_kind)
            else:
                if self.path.endswith("/responses"):
                    answer = _response(server, body)
                elif self.path.endswith("/messages"):
                    answer = _anthropic(server, body)
                else:
                    answer = _completion(server, body, chat=self.path.endswith("/chat/completions"))
                self._send(200, json.dumps(answer).encode())
            return None

    return Handler


@contextmanager
def serving() -> Iterator[FakeServer]:
    """A server on a free loopback port for the length of the block."""
    state = FakeServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.silent.clear()
        http.shutdown()
        http.server_close()
        thread.join()
