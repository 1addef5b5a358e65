"""ASGI applications behind real sockets, and requests to them as bytes."""

import asyncio
import gzip
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fake_server import CAPABILITIES, ROUTES, TRACE

ANSWER = {
    "id": "r",
    "object": "chat.completion",
    "created": 1,
    "model": "tiny",
    "sglext": {"whiflash": TRACE},
}
ANSWER |= {
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}]
}


@dataclass
class Recorder:
    """A server that answers every POST in the same way.

    answers: status, headers and body of the next answers; the last one is repeated.
    sent: path, headers and body of each POST. asked: headers of each question for capabilities.
    """

    answers: list[tuple[int, list[tuple[bytes, bytes]], bytes]] = field(
        default_factory=lambda: [(200, [(b"content-type", b"application/json")], json.dumps(ANSWER).encode())]
    )
    capabilities: dict[str, Any] = field(default_factory=lambda: {**CAPABILITIES, "routes": ROUTES})
    sent: list[tuple[bytes, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)
    asked: list[list[tuple[bytes, bytes]]] = field(default_factory=list)

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        parts = []
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        if scope["method"] == "POST":
            self.sent.append((scope["raw_path"], scope["headers"], b"".join(parts)))
            status, headers, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        else:
            self.asked.append(scope["headers"])
            found = (
                self.capabilities if scope["path"].endswith("/capabilities") else {"data": [{"id": "tiny"}]}
            )
            status, headers, body = 200, [], json.dumps(found).encode()
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def body(self, index: int = -1) -> dict[str, Any]:
        """The body of one POST."""
        found: dict[str, Any] = json.loads(self.sent[index][2])
        return found


def refusal(
    status: int, reason: str, *, zipped: bool = False
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """An answer that refuses."""
    body = json.dumps({"error": {"message": reason}}).encode()
    headers = [(b"content-type", b"application/json")]
    return (status, [*headers, (b"content-encoding", b"gzip")], gzip.compress(body, mtime=0)) if zipped else (
        status, headers, body
    )  # fmt: skip


@contextmanager
def listening(*, to: Any, port: int = 0) -> Iterator[str]:
    """The URL of an application under uvicorn for the length of the block."""
    import uvicorn

    bound = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(to, lifespan="off", log_level="critical", server_header=False, date_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def exchange(
    url: str, target: bytes, body: bytes = b"{}", *headers: bytes, method: bytes = b"POST"
) -> tuple[int, bytes, bytes]:
    """Status, head and body of the answer to a request whose bytes are these."""
    host, _, port = url.removeprefix("http://").partition(":")
    lines = [b"%s %s HTTP/1.1" % (method, target), b"host: x", b"content-length: %d" % len(body), *headers]
    if not any(line.lower().startswith(b"connection:") for line in lines):
        lines.append(b"connection: close")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\r\n".join([*lines, b"", body]))
        answer = b""
        while not _is_whole(answer) and (part := connection.recv(65536)):
            answer += part
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), head, rest


def _is_whole(answer: bytes) -> bool:
    """Whether it has all of the length that it names: one that refuses an upgrade leaves its connection open."""
    head, end, rest = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(end and length) and len(rest) >= int(length[1])
