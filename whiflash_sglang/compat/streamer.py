"""Rounds of traced requests, from the scheduler's output streamer to the HTTP process."""

from typing import Any

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from whiflash_sglang.compat.patching import replace
from whiflash_sglang.trace import TraceLog

META_KEY = "whiflash"

trace_log = TraceLog()
"""The scheduler process's own; the worker records into it."""


def install() -> None:
    """Idempotent."""
    replace(SchedulerOutputStreamer, "has_additional_customized_info", lambda _: True)
    replace(SchedulerOutputStreamer, "should_build_additional_customized_info", lambda _: _is_tracing)
    replace(SchedulerOutputStreamer, "build_additional_customized_info", lambda _: _rounds_of)


def _is_tracing(_: SchedulerOutputStreamer) -> bool:
    return len(trace_log) > 0


def _rounds_of(_: SchedulerOutputStreamer, reqs: list[Any]) -> dict[str, list[Any]]:
    """One list of rounds per emitted request; the HTTP process appends it to what it has."""
    return {META_KEY: [[list(r) for r in trace_log.take(q.rid, last=q.finished())] for q in reqs]}
