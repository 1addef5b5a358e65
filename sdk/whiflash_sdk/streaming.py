"""Answers as they pass: read for their traces, whoever sent the request, and without what only traces need.

A server sends the trace of a streamed completion in a last chunk of its own, without choices. It is taken out, so that
every chunk has a first choice as it does elsewhere. Everything else passes byte for byte.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import re
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel

from whiflash_sdk.collecting import CollectedCall
from whiflash_sdk.identity import base_classes
from whiflash_sdk.reading import json_or_none
from whiflash_sdk.trace import CALL, keep_stream

_EVENT_END: Final = re.compile(rb"\n\r?\n|\r\r")
_BLANK: Final = b" \t\r\n\xef\xbb\xbf"
"""Bytes that may be in front of a document: a byte order mark, too."""
_TELLS: Final = re.compile(rb'"sglext"|"tool_calls"\s*:\s*\[|"tool_use"')
_DATA: Final = re.compile(rb"(?:^|[\r\n])data: ?([^\r\n]*)")


class Passing:
    """The bytes of one answer, on their way to who asked.

    An answer that begins with a brace is one JSON document; any other is taken for server-sent events, whatever its
    content type: gateways change that.

    call: takes the traces in them. whole_text: the trace may count in the answer's text, so all of it is read.
    """

    def __init__(self, call: CollectedCall, *, whole_text: bool) -> None:
        self._call, self._whole_text = call, whole_text
        self._waiting = bytearray()
        self._is_document: bool | None = None
        self._passed = 0

    def feed(self, data: bytes) -> bytes:
        """Take bytes that arrived; return those to pass on. A stream's are whole events."""
        searched = max(len(self._waiting) - 3, 0)
        self._waiting += data
        if self._is_document is None and (begun := data.lstrip(_BLANK)):
            self._is_document = begun.startswith(b"{")
        if self._is_document:
            passed, self._passed = bytes(self._waiting[self._passed :]), len(self._waiting)
            return passed
        end = 0
        events = []
        while match := _EVENT_END.search(self._waiting, max(end, searched)):
            event, end = bytes(self._waiting[end : match.end()]), match.end()
            if not self._takes(event):
                events.append(event)
        del self._waiting[:end]
        return b"".join(events)

    def end(self) -> bytes:
        """The answer is complete or nobody reads on: the bytes that are left."""
        rest, self._waiting = bytes(self._waiting), bytearray()
        if self._is_document:
            _take(self._call, json_or_none(rest))
            rest = b""
        self._call.end()
        return rest

    def _takes(self, event: bytes) -> bool:
        """Keep the traces of an event. True if it holds nothing else."""
        first = self._call.response_id is None
        if not (first or self._whole_text or _TELLS.search(event)):
            return False
        body = json_or_none(b"\n".join(_DATA.findall(event)))
        answer = _take(self._call, body)
        if first and self._call.response_id is not None:
            keep_stream(self._call.response_id, self._call)
        return answer and _holds_nothing_else(body)


def _take(call: CollectedCall, body: Any) -> bool:
    """`call.take`, of an answer that may have other types than OpenAI's: reading it breaks nobody's stream."""
    try:
        return call.take(body)
    except (AttributeError, TypeError, ValueError):
        return False


def _holds_nothing_else(body: dict[str, Any]) -> bool:
    extension = body.get("sglext")
    is_ours = isinstance(extension, dict) and set(extension) == {"whiflash"}
    return is_ours and body.get("choices") == [] and not body.get("usage")


@functools.lru_cache(64)  # a client's text
def decodes(library: Any, coding: str) -> bool:
    """Whether an HTTP library reads answers with this content coding."""
    if not coding.isascii():
        return False
    if coding in ("", "identity"):
        return True
    try:
        return bool(library.Response(200, headers={"content-encoding": coding}, content=b"?").content != b"?")
    except library.DecodingError:
        return True


@functools.cache
def _streams(library: Any) -> tuple[type, type]:
    """The byte streams of an HTTP library (HTTPX, or HTTPX 2), with `Passing` in between."""

    class SharedStream:
        def __init__(self, stream: Any, items: Any, passing: Passing) -> None:
            self._stream, self._items, self._passing = stream, items, passing

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)  # what others keep there

    class SyncStream(SharedStream, library.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            for data in self._items:
                if passed := self._passing.feed(data):
                    yield passed
            if rest := self._passing.end():
                yield rest

        def close(self) -> None:
            self._passing.end()
            self._stream.close()

    class AsyncStream(SharedStream, library.AsyncByteStream):  # type: ignore[misc]
        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for data in self._items:
                if passed := self._passing.feed(data):
                    yield passed
            if rest := self._passing.end():
                yield rest

        async def aclose(self) -> None:
            self._passing.end()
            await self._stream.aclose()

    return SyncStream, AsyncStream


def watch(response: Any, call: CollectedCall, *, whole_text: bool) -> Passing | None:
    """Have an HTTP response read as it passes. Its stream is replaced, or read where that has happened.

    Returns what reads a stream; None: nothing is left to read, or nothing can be.
    """
    response.extensions[CALL] = call
    passing = Passing(call, whole_text=whole_text)
    if response.is_closed:  # a hook of the client has read it
        response._content = passing.feed(response.content) + passing.end()
        return None
    base = next(base for base in base_classes("Response") if isinstance(response, base))
    library: Any = sys.modules[base.__module__.partition(".")[0]]
    codings = response.headers.get("content-encoding", "").lower().split(",")
    if not all(decodes(library, coding.strip()) for coding in codings):
        return None
    stream = response.stream
    is_async = isinstance(stream, library.AsyncByteStream) and not isinstance(stream, library.SyncByteStream)
    items = stream
    if any(codings):
        inner = library.Response(response.status_code, headers=response.headers, stream=stream)
        items = inner.aiter_bytes() if is_async else inner.iter_bytes()
        del response.headers["content-encoding"]
    response.headers.pop("content-length", None)
    # The collector must find none of the iterators below: closing takes a lock that it may have been called under.
    response.stream = _streams(library)[is_async](stream, items if is_async else iter(items), passing)
    return passing


def note(result: Any, call: CollectedCall, *, whole_text: bool) -> None:
    """Take the trace of a client's result: a parsed answer, a raw one, or a stream, which brings it when it ends."""
    if isinstance(result, BaseModel | Mapping):
        _take(call, result)
        call.end()
        return
    answers = base_classes("Response")
    raw: Any = result if isinstance(result, answers) else getattr(result, "http_response", None)
    response: Any = raw or getattr(result, "response", None)
    is_answer = isinstance(response, answers)
    if not is_answer:
        return
    below = getattr(getattr(response, "stream", None), "_stream", None)  # it does not hold the response
    passing = watch(response, call, whole_text=whole_text)
    if raw is None and below is not None and not response.is_closed and not hasattr(result, "__aiter__"):

        def close() -> None:
            if passing is not None:
                passing.end()
            below.close()

        _close_when_lost(response, close)


_lost: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_closer: threading.Thread | None = None
_starting = threading.Lock()


def _close_when_lost(response: Any, close: Callable[[], None]) -> None:
    """Close what a response reads in a thread of its own when the response is gone, wherever that is noticed.

    The garbage collector may notice it inside httpcore, under the lock of the connection pool, which closing a
    response takes too: there it may only be noted, and `SimpleQueue.put` is made for that.
    """
    global _closer
    with _starting:
        if _closer is None or not _closer.is_alive():
            _closer = threading.Thread(target=_close_lost, name="whiflash-closes-streams", daemon=True)
            _closer.start()
    weakref.finalize(response, _lost.put, close).atexit = False


def _close_lost() -> None:
    while True:
        close = _lost.get()
        with contextlib.suppress(Exception):  # the connection is gone already, in whatever way
            close()
        del close
