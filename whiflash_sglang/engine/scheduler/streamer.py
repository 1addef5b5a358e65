"""Read priorities and cached tokens from SGLang's requests; keep a traced request's recording on it, and send it with
the request's last output. `http/traces.py` makes traces of the recordings.

A recording is an attribute of its request, so it ends with the request, however that ends. Outputs of requests that
asked for no trace are the ones that SGLang sends without us.
"""

from typing import Any

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.runtime_context import get_schedule
from whiflash_sdk.hints import TraceLevel

from whiflash_sglang.engine.carried import META_KEY, settings_of
from whiflash_sglang.telemetry.tally import CACHED
from whiflash_sglang.telemetry.trace import Recording

_RECORDING = "_whiflash_recording"


def recording_of(req: Any, level: TraceLevel | None) -> Recording | None:
    """Return the request's recording, begun now if it has none yet; None if neither a trace nor a span needs it."""
    found: Recording | None = getattr(req, _RECORDING, None)
    if found is None:
        spanned = bool(req.time_stats.trace_ctx.tracing_enable)
        if level is None and not spanned:
            return None
        found = Recording(level, len(req.origin_input_ids), spanned=spanned)
        setattr(req, _RECORDING, found)
    return found


def cached_of(req: Any) -> dict[str, int]:
    """Return the number of a prompt's cached tokens by place: `device`, `host` memory, `storage`; without zeros."""
    places = {place: int(getattr(req, f"cached_tokens_{place}")) for place in CACHED}
    return {place: tokens for place, tokens in places.items() if tokens}


def urgency(req: Any) -> int:
    """Return the request's priority, higher if it is more urgent; 0 without `--enable-priority-scheduling`."""
    schedule = get_schedule()
    if not schedule.enable_priority_scheduling or req.priority is None:
        return 0
    return int(-req.priority if schedule.schedule_low_priority_values_first else req.priority)


class OutputStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """SGLang's streamer of outputs, in a scheduler of ours: a request's recording leaves with its last output."""

    __slots__ = ()
    has_additional_customized_info = True

    def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
        """Return `META_KEY` → a list for each of `reqs`, with its recording if it ends now; empty if none has one."""
        recordings = [getattr(req, _RECORDING, None) if req.finished() else None for req in reqs]
        if not any(recordings):
            return {}
        for req, recording in zip(reqs, recordings, strict=True):
            if recording is not None:
                recording.policy = settings_of(self.server_args).router
                recording.cached = cached_of(req)
        return {META_KEY: [[] if recording is None else [recording] for recording in recordings]}
