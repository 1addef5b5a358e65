"""Streams of a wrapped client: the client's own, without the server's trace chunk among their items.

The server sends a stream's trace in a last chunk of its own, without choices. It is taken out and kept, so that every
chunk has a first choice as it does elsewhere, and `routing(stream)` gives the trace once the stream has ended.
"""

from __future__ import annotations

import copy
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar, get_args, get_origin

from openai import AsyncStream, Stream
from pydantic import BaseModel

from whiflash_sdk.collecting import call_of
from whiflash_sdk.trace import STREAMS, sent_traces, text_of, tools_called, with_text

ItemT = TypeVar("ItemT")


class _Kept:
    """The traces of a stream, one a choice, as the server sent them; handed to `collect` blocks when it ends."""

    def __init__(self, response: Any) -> None:
        self._by_choice: dict[int, Any] = {}
        self._texts: dict[int, list[str]] = {}
        self._response = response
        self._first: Any = None
        self._tools: dict[int, list[str]] = {}

    @property
    def raw_traces(self) -> list[Any]:
        texts = {choice: "".join(parts) for choice, parts in self._texts.items()}
        return [with_text(raw, texts) for raw in self._by_choice.values()]

    def takes(self, item: Any) -> bool:
        """Keep what an item tells. True if that is traces and nothing else."""
        if self._first is None:
            self._first = getattr(item, "response", item)  # events of the Responses API hold theirs
            if isinstance(name := getattr(self._first, "id", None), str):
                STREAMS[name] = self
        for choice in getattr(item, "choices", None) or ():
            self._texts.setdefault(choice.index, []).append(text_of(choice))
        for index, names in tools_called(item).items():
            self._tools.setdefault(index, []).extend(names)
        found = sent_traces(item)
        for raw in found:
            self._by_choice[raw.get("choice", 0) if isinstance(raw, dict) else 0] = raw
        return bool(found) and _holds_nothing_else(item)

    def ended(self) -> None:
        call = call_of(self._response)
        if call is not None:
            call.end(
                self.raw_traces, self._first, {index: tuple(names) for index, names in self._tools.items()}
            )


def _holds_nothing_else(item: Any) -> bool:
    if not isinstance(item, BaseModel) or getattr(item, "choices", None) or getattr(item, "usage", None):
        return False
    return set((item.model_extra or {}).get("sglext") or ()) == {"whiflash"}


class TracedStream(Stream[ItemT]):
    """The client's stream without the trace chunk. It is closed when nobody refers to it any more."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        kept = self._kept = _Kept(named["response"])
        # The client's iterator refers to its stream. It gets a copy for that, so that this stream is in no cycle, is
        # missed as soon as a loop over it was left, and can be closed then.
        del self._iterator
        items = copy.copy(self).__stream__()
        self._iterator = _without_traces(items, kept)
        _close_when_lost(self._iterator, items, self.response.close)

    @property
    def raw_traces(self) -> list[Any]:
        """Traces seen so far, one a choice, as the server sent them."""
        return self._kept.raw_traces


class AsyncTracedStream(AsyncStream[ItemT]):
    """The client's asynchronous stream without the trace chunk. Event loops close what is lost themselves."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        kept = self._kept = _Kept(named["response"])
        del self._iterator
        self._iterator = _async_without_traces(copy.copy(self).__stream__(), kept)

    @property
    def raw_traces(self) -> list[Any]:
        """Traces seen so far, one a choice, as the server sent them."""
        return self._kept.raw_traces


def _without_traces(items: Iterator[ItemT], kept: _Kept) -> Iterator[ItemT]:
    for item in items:
        if not kept.takes(item):
            yield item
    kept.ended()


async def _async_without_traces(items: AsyncIterator[ItemT], kept: _Kept) -> AsyncIterator[ItemT]:
    async for item in items:
        if not kept.takes(item):
            yield item
    kept.ended()


def traced_class(stream_cls: Any) -> Any:
    """The class to build a stream of, in place of the client's own; another one is left as it is."""
    origin, items = get_origin(stream_cls) or stream_cls, get_args(stream_cls)
    ours: Any = {Stream: TracedStream, AsyncStream: AsyncTracedStream}.get(origin)
    if ours is None:
        return stream_cls
    return ours[items] if items else ours


_lost: queue.SimpleQueue[tuple[Any, Callable[[], None]]] = queue.SimpleQueue()
_closer: threading.Thread | None = None
_starting = threading.Lock()


def _close_when_lost(reader: Any, items: Any, close: Callable[[], None]) -> None:
    """Close a response in a thread of its own when `reader` is gone, wherever that is noticed.

    The garbage collector may notice it inside httpcore, under the lock of the connection pool, which closing a
    response takes too: there it may only be noted, and `SimpleQueue.put` is made for that. `items` hold the response,
    and are held here so that they are not collected along with the reader.
    """
    global _closer
    with _starting:
        if _closer is None or not _closer.is_alive():
            _closer = threading.Thread(target=_close_lost, name="whiflash-closes-streams", daemon=True)
            _closer.start()
    weakref.finalize(reader, _lost.put, (items, close)).atexit = False


def _close_lost() -> None:
    while True:
        items, close = _lost.get()
        try:
            items.close()
            close()
        except Exception:  # the connection is gone already, in whatever way
            pass
        del items, close
