"""Reads traces from answers while they pass to the caller, and takes out the chunks that only carry a trace.

A server sends the trace of a streamed completion in a last chunk of its own, without choices. It is taken out, so that
every chunk has a first choice, as with other servers. Everything else passes byte for byte.
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
"""Bytes that may precede a document: whitespace, and those of a byte order mark."""
_TELLS: Final = re.compile(rb'"sglext"|"tool_calls"\s*:\s*\[|"tool_use"')
_DATA: Final = re.compile(rb"(?:^|[\r\n])data: ?([^\r\n]*)")


class Passing:
    """Passes the bytes of one answer on to the caller and reads their traces.

    An answer that begins with a brace is one JSON document; any other counts as server-sent events. The content type
    does not decide, because gateways change it.

    call: stores the traces. whole_text: read all events, because the trace may have offsets in the answer's text.
    """

    def __init__(self, call: CollectedCall, *, whole_text: bool) -> None:
        self._call, self._whole_text = call, whole_text
        self._waiting = bytearray()
        self._is_document: bool | None = None
        self._passed = 0

    def feed(self, data: bytes) -> bytes:
        """Take bytes that arrived, and return those to pass on: of a stream of events only whole events."""
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
        """End the call and return the remaining bytes: the answer is complete, or nobody reads on."""
        rest, self._waiting = bytes(self._waiting), bytearray()
        if self._is_document:
            _take(self._call, json_or_none(rest))
            rest = b""
        self._call.end()
        return rest

    def _takes(self, event: bytes) -> bool:
        """Store the traces of an event; True if it holds nothing else and must not be passed on."""
        first = self._call.response_id is None
        if not (first or self._whole_text or _TELLS.search(event)):
            return False
        body = json_or_none(b"\n".join(_DATA.findall(event)))
        answer = _take(self._call, body)
        if first and self._call.response_id is not None:
            keep_stream(self._call.response_id, self._call)
        return answer and _holds_nothing_else(body)


def _take(call: CollectedCall, body: Any) -> bool:
    """Store the traces by `call.take`; False if the answer has unexpected types, so that no stream breaks."""
    try:
        return call.take(body)
    except (AttributeError, LookupError, TypeError, ValueError):
        return False


def _holds_nothing_else(body: dict[str, Any]) -> bool:
    extension = body.get("sglext")
    is_ours = isinstance(extension, dict) and set(extension) == {"whiflash"}
    return is_ours and body.get("choices") == [] and not body.get("usage")


@functools.lru_cache(64)  # bounded, as a client sends it
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
    """Return the sync and async byte stream classes of an HTTP library (HTTPX, HTTPX 2) that read through `Passing`."""

    class SharedStream:
        def __init__(self, stream: Any, items: Any, passing: Passing) -> None:
            self._stream, self._items, self._passing = stream, items, passing

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)  # attributes that other code stored there

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
    """Read the traces of an HTTP response while it passes: replace its stream, or its content if that was read before.

    Returns the `Passing` of the stream; None if the response was read before, or its coding is unknown.
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
    # The garbage collector must not find the inner iterators: closing one takes a lock that it may run under.
    response.stream = _streams(library)[is_async](stream, items if is_async else iter(items), passing)
    return passing


def note(result: Any, call: CollectedCall, *, whole_text: bool) -> None:
    """Store in `call` the trace of a client's result: of a parsed answer, a raw one, or a stream once it ends."""
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
    below = getattr(getattr(response, "stream", None), "_stream", None)  # it has no reference to the response
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
    """Call `close` in a separate thread when the response is garbage-collected.

    The collector may run inside httpcore, under the lock of the connection pool, which closing a response takes, too.
    So the finaliser only puts `close` into a queue: `SimpleQueue.put` is reentrant.
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
        with contextlib.suppress(Exception):  # the connection is closed already
            close()
        del close
