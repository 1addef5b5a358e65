"""Recordings of traced requests become traces, samples and attributes of spans where SGLang puts their last output
together: in the process that serves HTTP, or that holds an `Engine`.

The scheduler draws the requests that are sampled for the operator (`TraceSampling.rate`) and records their rounds as if
they had asked; nothing of it goes into their answers.
"""

import asyncio
import time
from dataclasses import replace
from typing import Any

from whiflash_sdk.hints import TraceLevel

from whiflash_sglang.engine.carried import META_KEY, settings_of
from whiflash_sglang.engine.http.traces import place_text
from whiflash_sglang.engine.patching import around
from whiflash_sglang.telemetry.trace import Recording, SampleFiles, Sampler, build_trace, span_attributes

_ATTRIBUTES, _SAMPLER = "_whiflash_attributes", "_whiflash_sampler"


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.update_request_meta_info",
    params=("meta_info", "state", "customized_info", "index", "finish_reason"),
    why="SGLang cuts records by token offsets and repeats them with every output",
    until="it has records of a whole request",
)
def _taking_recordings(
    original: Any, self: Any, meta_info: Any, state: Any, customized_info: Any, index: int, finish_reason: Any
) -> None:
    """Keep recordings out of what SGLang cuts by token offsets and repeats with every output."""
    others = {key: values for key, values in customized_info.items() if key != META_KEY}
    original(self, meta_info, state, others, index, finish_reason)
    for recording in customized_info[META_KEY][index] if META_KEY in customized_info else ():
        if recording.level is not None:
            meta_info[META_KEY] = build_trace(recording, recording.policy, meta_info["completion_tokens"])
        if recording.sampled:
            _sample(self, state, meta_info, recording)
        if recording.spanned:
            attributes = span_attributes(recording, recording.policy, meta_info["completion_tokens"])
            setattr(state, _ATTRIBUTES, attributes)


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.convert_to_span_attrs",
    params=("state",),
    why="algorithms cannot add to spans",
    until="they can",
)
def _telling_spans(original: Any, self: Any, state: Any, *args: Any) -> dict[str, Any]:
    """The span of a request (`--enable-trace`) says who drafted it."""
    return {**original(self, state, *args), **getattr(state, _ATTRIBUTES, {})}


def _sample(manager: Any, state: Any, meta_info: dict[str, Any], recording: Recording) -> None:
    """Sample the request of `state` (SGLang's `ReqState`), whose last output is being put together."""
    if not recording.stretches:
        return  # No round: a health check, or an answer of one token.
    sampler, settings = _sampler(manager), settings_of(manager.server_args)
    if sampler is None:
        return
    tokens, reason = meta_info["completion_tokens"], meta_info["finish_reason"] or {}
    level: TraceLevel = "full" if settings.traces.text else "summary"
    trace = build_trace(replace(recording, level=level), recording.policy, tokens)
    sample = {
        "time": round(time.time(), 3),
        "id": meta_info["id"],
        "model": manager.server_args.served_model_name,
        "prompt_tokens": meta_info["prompt_tokens"],
        "completion_tokens": tokens,
        "finish_reason": reason.get("type"),
        "agent": recording.agent,
        "tenant": recording.tenant,
        "sglext": {META_KEY: trace},
    }
    if level == "full" and manager.tokenizer is not None:
        # Its text is whole as soon as the manager is done with this output.
        asyncio.get_running_loop().call_soon(_take_with_text, sampler, manager, state, sample)
    else:
        sampler.take(lambda: sample)


def _take_with_text(sampler: Sampler, manager: Any, state: Any, sample: dict[str, Any]) -> None:
    text, tokens = state.get_text(), list(state.output_ids)

    def made() -> dict[str, Any]:
        trace = sample["sglext"][META_KEY]
        if len(tokens) == sample["completion_tokens"]:
            place_text(manager, state.obj, 0, trace, tokens, text)
        return {**sample, "text": text}

    sampler.take(made)


def _sampler(manager: Any) -> Sampler | None:
    """This process's, begun with its first sample."""
    sampling = settings_of(manager.server_args).traces
    found: Sampler | None = getattr(manager, _SAMPLER, None)
    if found is None and sampling.directory is not None:
        found = Sampler(SampleFiles(sampling.directory, sampling.mib << 20))
        setattr(manager, _SAMPLER, found)
    return found
