"""Previews: while a tool runs, the server prefills what is known of a session's next prompt.

A `Turn` sends the conversation with an answer that calls tools, as the next request will, and with the tool's result as
far as it is written. The hint `preview` names the place where unknown text follows. Nothing depends on a preview, so
its errors are only logged, and a thread that waits for one keeps no interpreter alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock, Thread
from typing import Any, Final

from typing_extensions import Self

from whiflash_sdk.flow import Flow, run, run_async
from whiflash_sdk.hints import WIRE_KEY, Hints
from whiflash_sdk.identity import Asker
from whiflash_sdk.otel import untraced
from whiflash_sdk.trace import field_of

_LOG: Final = logging.getLogger("whiflash_sdk")
MARKER: Final = "WhiFlashPreviewEnd"
LEAST: Final = 1024
"""Characters of a result, at least, from one preview to the next."""
TIMEOUT: Final = dict.fromkeys(("connect", "read", "write", "pool"), 10.0)
"""Most seconds of each phase of a preview. A client of one connection has the next request wait as long."""
_UNSENT: Final = ("logprobs", "max_completion_tokens", "prediction", "rid", "stream", "stream_options", "top_logprobs")
"""Fields of a request that change nothing of the next prompt."""


class Turn:
    """A chat completion and its answer. If that calls tools, the next prompt is previewed. body: as it was sent.

    is_async: whether the asker's answers are awaited, in the event loop that runs now.
    """

    def __init__(self, asker: Asker, body: Mapping[str, Any], *, is_async: bool) -> None:
        self._asker, self._body = asker, body
        self._loop: asyncio.AbstractEventLoop | None = None
        if is_async:
            with suppress(RuntimeError):  # a loop of another library runs
                self._loop = asyncio.get_running_loop()
        self._is_over = is_async and self._loop is None
        self._message: dict[str, Any] = {"role": "assistant"}
        self._lock = Lock()
        self._next: tuple[str, Sequence[str]] | None = None
        self._is_sending = False
        self._task: asyncio.Task[None] | None = None
        self.results: dict[str, str] = {}
        """Results of the answer's tool calls that have ended, by id."""

    def take(self, body: Any) -> None:
        """Read the first choice of an answer, or of a chunk of it. When it ends with tool calls, preview the next
        prompt."""
        choice = next(iter(field_of(body, "choices") or ()), None)
        whole, delta = field_of(choice, "message"), field_of(choice, "delta")
        if whole is not None:
            self._message |= whole if isinstance(whole, Mapping) else whole.model_dump(exclude_none=True)
        for name in ("content", "reasoning_content"):
            if text := field_of(delta, name):
                self._message[name] = self._message.get(name, "") + text
        for part in field_of(delta, "tool_calls") or ():
            calls = self._message.setdefault("tool_calls", [])
            if part.get("id"):
                calls.append({"id": part["id"], "type": "function", "function": {"name": "", "arguments": ""}})
            for name in ("name", "arguments"):
                calls[-1]["function"][name] += part["function"].get(name) or ""
        if field_of(choice, "finish_reason") is not None and (call := self.call()):
            self.send(call, ())

    def call(self, call: str | None = None) -> str | None:
        """Return `call`, or the first tool call, if it has no result yet; otherwise None."""
        return next((one for one in self._calls() if one not in self.results and call in (None, one)), None)

    def _calls(self) -> list[str]:
        return [call["id"] for call in self._message.get("tool_calls") or ()]

    def end(self) -> None:
        """Send nothing more, and cancel a task: the conversation has gone on, or its session has ended."""
        self._is_over = True
        if self._task is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    def send(self, call: str, parts: Sequence[str]) -> None:
        """Preview the next prompt, which ends with the result of `call`, as far as it is known; a running preview ends
        first. Nothing is sent unless the calls before this one have results.

        parts: of the result. They may grow, and are joined when they are sent.
        """
        if self._is_over or self.call() != call:
            return
        with self._lock:
            self._next = call, parts
            if self._is_sending:
                return
            self._is_sending = True
        with suppress(RuntimeError):  # the loop is closed, no thread can be started, or the interpreter exits
            if self._loop is None:
                Thread(target=lambda: run(self._sending()), name="whiflash-preview", daemon=True).start()
            else:
                self._loop.call_soon_threadsafe(self._start, self._loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = loop.create_task(run_async(self._sending()))

    def _sending(self) -> Flow[None]:
        while True:
            with self._lock:
                result, self._next = None if self._is_over else self._next, None
                self._is_sending = result is not None
            if result is None:
                return
            try:
                body = self._preview(*result)
                with untraced():
                    yield from self._asker.ask(f"{self._asker.base}/chat/completions", TIMEOUT, body)
            except Exception as error:  # the next request is served as without previews
                _LOG.debug("%s took no preview (%s)", self._asker.base.rpartition("@")[2], type(error).__name__)
                self._is_over |= getattr(error, "response", None) is not None  # otherwise it had no time

    def _preview(self, call: str, parts: Sequence[str]) -> dict[str, Any]:
        """Return the body of a preview, whose last answer has only fields that earlier answers have."""
        before, calls = self._body["messages"], self._calls()
        fields = {"role", "content", "tool_calls"}.union(*(one for one in before if one["role"] == "assistant"))
        answer = {name: value for name, value in self._message.items() if name in fields}
        texts = [*((one, self.results[one]) for one in calls[: calls.index(call)]), (call, "".join(parts) + MARKER)]
        results = [{"role": "tool", "tool_call_id": one, "content": text} for one, text in texts]
        body = {name: value for name, value in self._body.items() if name not in _UNSENT}
        params = {**(body.get("custom_params") or {}), WIRE_KEY: Hints(preview=MARKER, learn=False).encode()}
        # A server that does not know previews answers one token.
        return {**body, "messages": [*before, answer, *results], "max_tokens": 1, "custom_params": params}


class StreamedResult:
    """A tool's result that is written piece by piece, in a `with` block, and previewed meanwhile."""

    def __init__(self, turn: Turn | None, call: str | None) -> None:
        self._turn, self._call = turn, turn.call(call) if turn else None
        self._parts: list[str] = []
        self._length = self._unsent = 0

    @property
    def text(self) -> str:
        """Return what was written so far, the result for the conversation."""
        return "".join(self._parts)

    def write(self, text: str) -> int:
        """Add text to the result, and preview it if that is due. Returns its length, as files do; it does not wait."""
        self._parts.append(text)
        self._length, self._unsent = self._length + len(text), self._unsent + len(text)
        # Each preview carries all of a long result, so the next one waits until it has grown by a part.
        if self._turn is not None and self._call is not None and self._unsent >= max(LEAST, self._length // 8):
            self._unsent = 0
            self._turn.send(self._call, self._parts)
        return len(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._turn is not None and self._call is not None:
            self._turn.results[self._call] = self.text
