"""End each run of accepted tokens where plain decoding would end, before anything keeps the run.

SGLang looks for stop strings and patterns in all the text of a run at once, when its tokens are in the request: the
first string of its list wins over the first one in the text, a string after a stop token over the token, and a pattern
meets other beginnings and ends. By then the tokens after the stop are counted as reasoning and committed. So a run is
cut where SGLang cuts runs that complete a grammar, and only its last token can end the request. Under overlap
scheduling a run may also pass the token limit. The worker itself ends runs at a request's first stop tokens
(`StopTable`); runs of a request with more are cut here, too.
"""

from copy import copy
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

from whiflash_sglang.cache.tokens import FEW
from whiflash_sglang.engine.carried import serves_ours
from whiflash_sglang.engine.forward.sampling import stop_ids
from whiflash_sglang.engine.patching import around


class BatchResultProcessor(SchedulerBatchResultProcessor):  # type: ignore[misc]
    """SGLang's processor of results, which ends accepted runs where plain decoding would end."""

    __slots__ = ()

    def advance_grammar_fsm(self, result: Any, batch: Any) -> None:
        """Advance grammars by results, except for prompts that only want scores (`scores`): their token is a filler."""
        if not (batch.forward_mode.is_extend() and batch.is_prefill_only):
            super().advance_grammar_fsm(result, batch)

    def _resolve_spec_v2_tokens(self, result: Any, batch: Any) -> list[list[int]]:
        """Return the committed tokens by request. A run ends at the token that ends the request."""
        runs: list[list[int]] = super()._resolve_spec_v2_tokens(result, batch)
        for i, req in enumerate(batch.reqs):
            if req.is_retracted or req.finished() or req.to_finish:
                continue
            kept = _kept(req, runs[i])
            if kept < len(runs[i]):
                req.kv.kv_committed_len -= len(runs[i]) - kept
                runs[i] = runs[i][:kept]
                # SGLang reads here that a recurrent state is ahead of the tokens.
                result.grammar_retained_tokens = result.grammar_retained_tokens or [None] * len(runs)
                result.grammar_retained_tokens[i] = runs[i]
        return runs


def _kept(req: Req, run: list[int]) -> int:
    """Return how many tokens of a run plain decoding would keep: up to the one that ends the request, or all."""
    room = min(len(run), req.sampling_params.max_new_tokens - len(req.output_ids))
    if room < 2 or not _ends_anywhere(req):
        return room
    seen = copy(req)
    seen.grammar = None  # The grammar has taken the whole run already.
    seen.output_ids = req.output_ids[-req._stop_match_tail_len(1) :]
    for kept, token in enumerate(run[:room], 1):
        seen.output_ids.append(token)
        seen.update_finish_state(1)
        if seen.finished():
            return kept
    return room


def _ends_anywhere(req: Req) -> bool:
    """Whether a run of the request may hold an end that the worker does not look for."""
    params, tokenizer = req.sampling_params, req.tokenizer
    if params.stop_strs or params.stop_regex_strs:
        return True
    named = params.stop_token_ids, req.eos_token_ids, tokenizer and tokenizer.additional_stop_token_ids
    # Most requests name few, and to merge them takes longer than to count them.
    return sum(len(ids or ()) for ids in named) >= FEW and len(stop_ids(req)) > FEW


@around(
    "sglang.srt.managers.schedule_batch:Req.update_finish_state",
    params=("new_accepted_len",),
    why="SGLang looks for stop strings in a run as a whole",
    until="it finds the first stop of a run",
)
def _by_the_last_token(original: Any, self: Req, new_accepted_len: int = 1) -> None:
    """Let only the last token of a run end a request by its text."""
    if new_accepted_len > 1 and serves_ours() and _ends_anywhere(self):
        new_accepted_len = 1
    original(self, new_accepted_len)
