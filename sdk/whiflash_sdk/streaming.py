"""Traces while streaming: `for chunk in (stream := traced(client.chat.completions.create(stream=True, …)))`.

Chunks pass through unchanged; the trace seen so far is read with `routing(stream)` at any moment.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, Generic, TypeVar, overload

from whiflash_sdk.trace import raw_traces

ItemT = TypeVar("ItemT")


class _Seen:
    """The newest trace of every choice: a server sends each trace as far as it has come."""

    def __init__(self) -> None:
        self._by_choice: dict[int, Any] = {}

    @property
    def raw_traces(self) -> list[Any]:
        """Traces seen so far, one a choice, as the server sent them."""
        return list(self._by_choice.values())

    def _note(self, item: Any) -> None:
        for raw in raw_traces(getattr(item, "chunk", item)):
            self._by_choice[raw.get("choice", 0) if isinstance(raw, dict) else 0] = raw


class TracedStream(_Seen, Generic[ItemT]):
    """An iterator over a synchronous stream's own items."""

    def __init__(self, stream: Iterable[ItemT]) -> None:
        super().__init__()
        self._items = iter(stream)

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        item = next(self._items)
        self._note(item)
        return item


class AsyncTracedStream(_Seen, Generic[ItemT]):
    """An iterator over an asynchronous stream's own items."""

    def __init__(self, stream: AsyncIterable[ItemT]) -> None:
        super().__init__()
        self._items = aiter(stream)

    def __aiter__(self) -> AsyncIterator[ItemT]:
        return self

    async def __anext__(self) -> ItemT:
        item = await anext(self._items)
        self._note(item)
        return item


@overload
def traced(stream: Iterable[ItemT]) -> TracedStream[ItemT]: ...
@overload
def traced(stream: AsyncIterable[ItemT]) -> AsyncTracedStream[ItemT]: ...
def traced(stream: Any) -> Any:
    """Pass a stream's items through and keep its trace.

    stream: what `create(stream=True)` returned, or the event stream inside `with …stream(…) as`.
    """
    return AsyncTracedStream(stream) if isinstance(stream, AsyncIterable) else TracedStream(stream)
