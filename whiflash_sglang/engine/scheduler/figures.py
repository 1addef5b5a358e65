"""Make SGLang's own figures of speculation count the drafts that were proposed.

Upstream counts every round as one that proposes the widest block to every request. Here a round proposes only drafts
that are expected to pay. Upstream has figures for drafters that choose the number of rows per request: its `cap`
figures, which count the bonus token's row too, and the worker fills them. Rows minus forwards are the drafts, by which
the acceptance rates are computed.

OpenAI requests with `return_spec_tokens_details` also get the figures in vLLM's form, which benchmark harnesses read.
"""

from collections.abc import Mapping
from typing import Any

from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
from sglang.srt.runtime_context import get_spec

from whiflash_sglang.engine.carried import asks_for_ours
from whiflash_sglang.engine.patching import around


def accept_rate(accepted: int, proposed: int) -> float:
    """Return the share of the proposed drafts that were accepted; 0 if none was proposed, as upstream does."""
    return accepted / proposed if proposed else 0.0


class MetricsReporter(SchedulerMetricsReporter):  # type: ignore[misc]
    """SGLang's reporter of counts, log lines and Prometheus metrics, with a corrected accept rate."""

    def report_decode_stats(self: Any, *args: Any, **named: Any) -> None:
        """Report accepted over proposed drafts as SGLang's accept rate. Upstream divides accepted drafts by forwards
        times the widest block in the middle of its report, so the dividend is scaled during the call.
        """
        accepted, forwards = self.spec_num_correct_drafts, self.spec_num_forward_ct
        rate = accept_rate(accepted, self.spec_num_cap_tokens - forwards)
        self.spec_num_correct_drafts = rate * forwards * (get_spec().speculative_num_draft_tokens - 1)
        super().report_decode_stats(*args, **named)
        if self.spec_num_forward_ct:  # it was not yet time to report, so counting goes on
            self.spec_num_correct_drafts = accepted


@around(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._calculate_spec_decoding_metrics",
    params=("meta_info", "recv_obj", "i"),
    why="SGLang takes the widest block for what was proposed",
    until="it rates by its own `cap` figures",
)
def _of_an_answer(original: Any, self: Any, meta_info: dict[str, Any], recv_obj: Any, i: int) -> None:
    """Compute the figures of an answer from the drafts that were proposed."""
    original(self, meta_info, recv_obj, i)
    if asks_for_ours(self.server_args) and "spec_num_proposed_drafts" in meta_info:
        proposed = recv_obj.spec_num_cap_tokens[i] - recv_obj.spec_verify_ct[i]
        meta_info["spec_num_proposed_drafts"] = proposed
        meta_info["spec_accept_rate"] = accept_rate(meta_info["spec_num_correct_drafts"], proposed)


METRICS = "metrics"
DETAILS = "spec_tokens_details"


def acceptance_in(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return vLLM's `metrics` for an OpenAI answer or chunk, from SGLang's `spec_tokens_details` of its one choice;
    None without these details, or with several choices.

    A round that drafted nothing is a step that accepted nothing. The histogram has a count for every number of drafts
    that fits a block. Source: github.com/vllm-project/vllm/pull/48915.
    """
    details = (answer.get("sglext") or {}).get(DETAILS)
    if not isinstance(details, dict):
        return None
    rounds, accepted = details["spec_verify_ct"], details["spec_num_correct_drafts"]
    widest = get_spec().speculative_num_draft_tokens - 1
    counts = details["spec_correct_drafts_histogram"]
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + accepted / rounds,
            "draft_acceptance_rate": details["spec_accept_rate"],
            "acceptance_histogram": [*counts, *[0] * (widest + 1 - len(counts))],
            "num_spec_steps": rounds,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": details["spec_num_proposed_drafts"],
            "num_spec_tokens": widest,
        }
    }
