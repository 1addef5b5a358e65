"""Serve requests that want only a prompt's log-probabilities (`max_new_tokens` 0, `/v1/score`) as plain decoding does.

SGLang samples nothing for a batch of them and reads scores at chosen positions, but not with a speculative algorithm,
since its own algorithms may draft from the token that a prefill sampled.
"""

from sglang.srt.managers.schedule_batch import Req

from whiflash_sglang.engine.carried import serves_ours
from whiflash_sglang.engine.patching import around


@around(
    "sglang.srt.managers.schedule_batch:Req.is_prefill_only",
    why="SGLang samples for scores where an algorithm speculates",
    until="an algorithm may say that it needs no sample",
    makes=True,
)
def _as_plain(original: property) -> property:
    """Let a request that wants only scores run as in plain decoding: as a prefill without sampling."""

    def is_prefill_only(self: Req) -> bool:
        return self.sampling_params.max_new_tokens == 0 if serves_ours() else bool(original.__get__(self))

    return property(is_prefill_only)
