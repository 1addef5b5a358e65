"""Stock SGLang on the CPU: every algorithm against Hugging Face's logits and against plain decoding."""

import random
from typing import Any

import pytest
import torch
from engine import Engine, engine
from matrix import sampled
from transformers import AutoModelForCausalLM

from whiflash_cpu.attention import CpuAttentionBackend

from .conftest import Checkpoints

PAGED = {"page_size": 16, "chunked_prefill_size": 64}
CONFIGURATIONS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "none": (None, {}),
    "none-paged": (None, PAGED),
    "torch_native": (None, {"attention_backend": "torch_native"}),
    "EAGLE3": ("EAGLE3", {}),
    "EAGLE3-paged": ("EAGLE3", PAGED),
    "DFLASH": ("DFLASH", {}),
    "DFLASH-paged": ("DFLASH", PAGED),
}
TOKENS = {"max_total_tokens": 8000, "max_running_requests": 6}


def stock(checkpoints: Checkpoints, algorithm: str | None) -> dict[str, Any]:
    """Server arguments of an algorithm of SGLang's."""
    if algorithm is None:
        return {}
    named: dict[str, Any] = {"speculative_algorithm": algorithm}
    if algorithm == "EAGLE3":
        named |= {"speculative_draft_model_path": str(checkpoints.eagle3), "speculative_num_steps": 4}
        named |= {"speculative_eagle_topk": 1, "speculative_num_draft_tokens": 5}
    if algorithm == "DFLASH":
        named |= {"speculative_draft_model_path": str(checkpoints.dflash)}
    return named


def prompts() -> list[list[int]]:
    """Prompts of many lengths; every third one extends an earlier one (a prefix hit)."""
    texts: list[list[int]] = []
    for i in range(12):
        ids = random.Random(i).choices(range(256), k=[3, 20, 70, 150, 260][i % 5])
        texts.append([*texts[i - 2], *ids[:40]] if i % 3 == 2 else ids)
    return texts


def answered(e: Engine, name: str, **params: Any) -> list[list[int]]:
    """Answers to all prompts at once, `name-number`."""
    rids = [f"{name}-{i:02d}" for i in range(len(prompts()))]
    for i, (rid, prompt) in enumerate(zip(rids, prompts(), strict=True)):
        e.submit(rid, prompt, **{"max_new_tokens": 24 + 5 * (i % 4), **params})
    e.run()
    return [e.output(rid) for rid in rids]


@pytest.fixture(scope="module")
def expected(checkpoints: Checkpoints) -> list[list[int]]:
    """Plain greedy decoding, one at a time, without a prefix cache."""
    with engine(checkpoints.target, **{**TOKENS, "max_running_requests": 1}, disable_radix_cache=True) as e:
        return answered(e, "alone")


@pytest.fixture(scope="module")
def logprobs(checkpoints: Checkpoints, expected: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of the expected answers' tokens, by Hugging Face's own model."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints.target, dtype=torch.float32).eval()
    rates = []
    with torch.inference_mode():
        for prompt, text in zip(prompts(), expected, strict=True):
            logits = model(torch.tensor([[*prompt, *text]])).logits[0].log_softmax(-1)
            rates.append(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(text)[:, None]).squeeze(1))
    return rates


@pytest.mark.parametrize("name", sampled(CONFIGURATIONS, "none-paged", "EAGLE3-paged", "DFLASH"))
def test_text_is_plain_decodings_and_logits_are_hugging_faces(
    checkpoints: Checkpoints, expected: list[list[int]], logprobs: list[torch.Tensor], name: str
) -> None:
    """fp32, in a batch of six whose members come and go, with prefix hits; after prefill, decoding or verification."""
    algorithm, extra = CONFIGURATIONS[name]
    with engine(checkpoints.target, **TOKENS, **stock(checkpoints, algorithm), **extra) as e:
        ours = isinstance(e.scheduler.tp_worker.model_runner.attn_backend, CpuAttentionBackend)
        assert ours == ("attention_backend" not in extra)
        assert not e.scheduler.enable_overlap
        assert answered(e, "first") == expected
        assert max(req.cached_tokens for req in e.requests.values()) >= 16
        if algorithm is not None:
            rounds, accepted = map(sum, zip(*(e.rounds(rid) for rid in e.requests), strict=True))
            assert accepted > 0.1 * rounds, "hardly a draft was right, so nothing was tested"
        assert answered(e, "rated", return_logprob=True) == expected
        for i, wanted in enumerate(logprobs):
            values = e.requests[f"rated-{i:02d}"].logprob.output_token_logprobs_val
            torch.testing.assert_close(torch.tensor(values[: len(wanted)]), wanted, rtol=0, atol=2e-4)
        # One token to choose from gives the greedy answer at any temperature; several give several answers.
        assert answered(e, "forced", temperature=1.5, top_k=1) == expected
        assert answered(e, "free", temperature=1.5, top_p=0.9) != expected


@pytest.mark.evidence
def test_upstream_adapts_its_steps(checkpoints: Checkpoints, expected: list[list[int]]) -> None:
    """As WHIFLASH is measured beside: a drafter that is never right loses its steps."""
    adaptive = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(checkpoints.eagle3)}
    with engine(checkpoints.target, **TOKENS, **adaptive, speculative_adaptive=True) as e:
        before = e.worker.speculative_num_steps
        assert answered(e, "adapted") == expected
        assert e.worker.speculative_num_steps < before
        e.check_leaks()
