"""Scores of prompts are plain decoding's. So are other log-probabilities, as `test_plain_text.py` shows: of the output,
the likeliest, named tokens and the prompt.

They belong to the logits that a token was sampled from: behind penalties, bias, grammar and processor, and divided by
the temperature unless SGLANG_RETURN_ORIGINAL_LOGPROB says otherwise.
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from overlap import overlapped
from reference import TIE
from sglang.srt.managers.utils import GenerationBatchResult
from traffic import Arrival, play

from whiflash_sglang.engine.scheduler.spec_worker import RoundResult


@pytest.mark.parametrize("loop", [engine, overlapped])
def test_scores_are_plain_decodings(models: Models, loop: Any) -> None:
    """Prompts only, at chosen positions or after the last token, beside requests that decode."""
    rng = random.Random(7)
    prompts = [tuple(rng.choices(range(32, 127), k=rng.randint(9, 20))) for _ in range(9)]
    scored: dict[str, Any] = {"max_new_tokens": 0, "return_logprob": True, "token_ids_logprob": [69, 75, 256]}
    kinds: list[dict[str, Any]] = [
        {**scored, "logprob_start_len": 0, "token_indices_to_pool": [2, 5, 8]},
        scored,
        {"max_new_tokens": 24},
    ]
    arrivals = [Arrival(f"r{i}", i // 2, prompt, kinds[i % len(kinds)]) for i, prompt in enumerate(prompts)]
    options = {"disable_radix_cache": True, "chunked_prefill_size": -1, "mem_fraction_static": 0.5}
    with loop(models.target, **options) as e:
        texts, plain = play(e, arrivals), scores(e)
    assert [list(map(len, plain[f"r{i}"])) for i in range(3)] == [[9, 0], [0, 3], [0, 0]]
    with loop(models.target, whiflash=models.whiflash("random"), **options) as e:
        for router in ("random", "none"):
            e.worker.reconfigure({"router": router})
            e.requests.clear()
            assert play(e, arrivals) == texts
            for rid, ours in scores(e).items():
                for values, wanted in zip(ours, plain[rid], strict=True):
                    assert values == pytest.approx(wanted, abs=TIE), rid


def scores(e: Engine) -> dict[str, list[list[float]]]:
    """Scores of every request: those of its prompt, and those after it."""
    return {
        rid: [
            [float(value) for row in rows or [] for value in row or ()]
            for rows in (req.logprob.input_token_ids_logprobs_val, req.logprob.output_token_ids_logprobs_val)
        ]
        for rid, req in e.requests.items()
    }


class OnCard(torch.Tensor):
    device = torch.device("cuda")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def test_a_cards_results_reach_the_host_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang carries nothing then, and refuses tokens that are elsewhere."""

    class Sent(dict[str, torch.Tensor]):
        at = SimpleNamespace(tokens="tokens", accept_lens="lengths", widths="widths")

    monkeypatch.setattr(GenerationBatchResult, "copy_to_cpu", lambda *_: None)
    result: Any = RoundResult()
    names = vars(Sent.at).values()
    result.results, result.rated = Sent({name: torch.ones(2).as_subclass(OnCard) for name in names}), None
    result.copy_to_cpu()
    for tensor in (result.next_token_ids, result.accept_lens, result.cap_lens):
        assert type(tensor) is torch.Tensor
