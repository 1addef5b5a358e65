"""A small HTTP server that answers as a test says, also OpenAI's chat completions."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, Any, bytes], tuple[int, bytes]]
"""Returns status and body of the answer to a path, headers and a body, empty for GET."""
Reply = Callable[["ChatApp", str], list[str] | None]
"""Returns the pieces of an answer to a prompt's last message; None: the server breaks off after a first piece."""


@dataclass
class ChatApp:
    """A running server. models: lists them; None: it answers with a page. key: it wants. refused: messages that it does
    not take, and its status. answers: raw ones, of any shape. asked: bodies, in order."""

    reply: Reply = lambda app, text: [f"You said {text}", ".", " Bye."]
    models: list[dict[str, Any]] | None = field(default_factory=lambda: [{"id": "org/M", "owned_by": "sglang"}])
    key: str = ""
    verifications: int | None = None
    refused: dict[str, int] = field(default_factory=dict)
    answers: tuple[int, bytes] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        self.paths.add(path)
        if body:
            return self._chat(json.loads(body))
        if path not in ("/v1/models", "/server_info"):
            return 404, b""
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, b"{}"
        if self.models is None:
            return 200, b"<html>"
        info = {"data": self.models} if path == "/v1/models" else {"version": "0.5.23", "api_key": "K"}
        return 200, json.dumps(info).encode()

    def _chat(self, body: dict[str, Any]) -> tuple[int, bytes]:
        self.asked.append(body)
        last = body["messages"][-1]["content"]
        if last in self.refused or self.answers:
            return self.answers or (self.refused[last], b"")
        return 200, "".join(f"data: {json.dumps(event)}\n\n" for event in self.events(last)).encode()

    def events(self, last: str) -> Iterator[dict[str, Any]]:
        pieces = self.reply(self, last)
        for piece in pieces or ["Hm"]:
            yield {"choices": [{"delta": {"content": piece}}]}
        if pieces is not None:
            yield {"choices": [{"delta": {}, "finish_reason": "stop"}]}
            details = {"spec_tokens_details": {"spec_verify_ct": self.verifications}} if self.verifications else None
            yield {"choices": [], "usage": {"completion_tokens": len(pieces)}, "sglext": details}


@contextmanager
def serving(**fields: Any) -> Iterator[ChatApp]:
    app = ChatApp(**fields)
    with answering(app.answer) as app.url:
        yield app


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Serve in a thread; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = answer(self.path, self.headers, body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
