"""Make a request's trace and the attributes of its tracing span from its recording, when SGLang makes its last output:
in the process that serves HTTP or holds an `Engine`.
"""

from typing import Any

from whiflash_sglang.engine.carried import META_KEY
from whiflash_sglang.engine.patching import around
from whiflash_sglang.telemetry.trace import build_trace, span_attributes

_ATTRIBUTES = "_whiflash_attributes"


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager.update_request_meta_info",
    params=("meta_info", "state", "customized_info", "index", "finish_reason"),
    why="SGLang cuts records by token offsets and repeats them with every output",
    until="it has records of a whole request",
)
def _taking_recordings(
    original: Any, self: Any, meta_info: Any, state: Any, customized_info: Any, index: int, finish_reason: Any
) -> None:
    """Keep recordings out of the records that SGLang cuts by token offsets and repeats with every output."""
    others = {key: values for key, values in customized_info.items() if key != META_KEY}
    original(self, meta_info, state, others, index, finish_reason)
    for recording in customized_info[META_KEY][index] if META_KEY in customized_info else ():
        if recording.level is not None:
            meta_info[META_KEY] = build_trace(recording, recording.policy, meta_info["completion_tokens"])
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
    """Add to a request's tracing span (`--enable-trace`) which drafters drafted it."""
    return {**original(self, state, *args), **getattr(state, _ATTRIBUTES, {})}
