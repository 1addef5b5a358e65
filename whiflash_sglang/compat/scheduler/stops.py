"""Stop strings and patterns, found in a block where plain decoding finds them.

SGLang looks for them in all the text of a block at once: the first string of its list wins over the first one in the
text, a string behind a stop token over the token, and a pattern meets other beginnings and ends. Tokens after them
enter a session's next turn. Here the scheduler sees a block's tokens one by one and keeps none behind the first
stop. Stop tokens need no text: the worker ends a block at them (`accept_and_commit` with `StopTable`).
"""

from typing import Any

from sglang.srt.managers.schedule_batch import Req

from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.patching import around, replace


def install() -> None:
    """Idempotent."""
    replace(Req, "update_finish_state", _token_by_token)


@around
def _token_by_token(original: Any, self: Req, new_accepted_len: int = 1) -> None:
    params, grammar = self.sampling_params, self.grammar
    stops = params.stop_strs or params.stop_regex_strs
    if new_accepted_len <= 1 or self.to_finish or not stops or not serves_ours():
        original(self, new_accepted_len)
        return
    run = self.output_ids[-new_accepted_len:]
    del self.output_ids[-new_accepted_len:]
    for left, token in zip(reversed(range(len(run))), run, strict=True):
        self.output_ids.append(token)
        # It has taken the whole run already, and ends with its last token if it ends.
        self.grammar = None if left else grammar
        original(self, 1)
        if self.finished():
            break
    self.grammar = grammar
