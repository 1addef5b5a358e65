"""Requests whose traces are sampled for the operator, taken where their last output arrives.

The scheduler draws them (`TraceSampling.rate`) and records their rounds as if they had asked; nothing of it goes into
their answers.
"""

import asyncio
import time
from dataclasses import replace
from typing import Any

from whiflash_sdk.hints import TraceLevel

from whiflash_sglang.engine.carried import META_KEY, settings_of
from whiflash_sglang.engine.http import traces
from whiflash_sglang.telemetry.trace import Recording, SampleFiles, Sampler, build_trace

_SAMPLER = "_whiflash_sampler"


def take(manager: Any, state: Any, meta_info: dict[str, Any], recording: Recording) -> None:
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
            traces.place_text(manager, state.obj, 0, trace, tokens, text)
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
