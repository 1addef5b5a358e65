"""A small HTTP server of OpenAI's chat completions, which says what a test wants it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["ChatApp", str], list[str] | None]
"""Returns the pieces of an answer to a prompt's last message; None: the server breaks off after a first piece."""


@dataclass
class ChatApp:
    """A running server. models: lists them; None: it answers with a page. key: it wants. refused: message that is too
    long for it. asked: bodies, in order."""

    reply: Reply = lambda app, text: [f"You said {text}", ".", " Bye."]
    models: list[dict[str, Any]] | None = field(default_factory=lambda: [{"id": "org/M", "owned_by": "sglang"}])
    key: str = ""
    verifications: int | None = None
    refused: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    url: str = ""

    def answer(self, path: str, headers: Any) -> tuple[int, str]:
        self.paths.add(path)
        if path not in ("/v1/models", "/server_info"):
            return 404, ""
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, "{}"
        if self.models is None:
            return 200, "<html>"
        return 200, json.dumps({"data": self.models} if path == "/v1/models" else {"version": "0.5.23", "api_key": "K"})

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        pieces = self.reply(self, body["messages"][-1]["content"])
        for piece in pieces or ["Hm"]:
            yield {"choices": [{"delta": {"content": piece}}]}
        if pieces is not None:
            yield {"choices": [{"delta": {}, "finish_reason": "stop"}]}
            details = {"spec_tokens_details": {"spec_verify_ct": self.verifications}} if self.verifications else None
            yield {"choices": [], "usage": {"completion_tokens": len(pieces)}, "sglext": details}


@contextmanager
def serving(**fields: Any) -> Iterator[ChatApp]:
    app = ChatApp(**fields)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = app.answer(self.path, self.headers)
            self._send(status, text)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            app.paths.add(self.path)
            app.asked.append(body)
            if body["messages"][-1]["content"] == app.refused:
                self.send_error(400)
            elif not body.get("stream"):
                text = "".join(app.reply(app, body["messages"][-1]["content"]) or [])
                self._send(200, json.dumps({"choices": [{"message": {"content": text}}]}))
            else:
                self._send(200, "".join(f"data: {json.dumps(event)}\n\n" for event in app.events(body)))

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        app.url = f"http://127.0.0.1:{server.server_port}"
        yield app
        server.shutdown()
