"""Stock SGLang on the CPU: every configuration against Hugging Face's logits and against plain decoding."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from matrix import sampled
from server_host import Server, ServerHost
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from .conftest import Checkpoints

pytestmark = pytest.mark.server

PAGED = ("--page-size", "16", "--chunked-prefill-size", "64")
CONFIGURATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "none": ("none", ()),
    "none-paged": ("none", PAGED),
    "torch_native": ("none", ("--attention-backend", "torch_native")),
    "EAGLE3": ("EAGLE3", ()),
    "EAGLE3-paged": ("EAGLE3", PAGED),
    "NGRAM": ("NGRAM", ()),
    "DFLASH": ("DFLASH", ()),
    "DFLASH-paged": ("DFLASH", PAGED),
}


@dataclass(frozen=True)
class Configured:
    name: str
    algorithm: str
    server: Server


def random_ids(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(256) for _ in range(length)]


def requests() -> list[dict[str, Any]]:
    """Prompts and answers of many lengths; every third prompt extends an earlier one (a prefix hit)."""
    bodies: list[dict[str, Any]] = []
    for i in range(18):
        ids = random_ids(i, [3, 20, 70, 150, 260][i % 5])
        if i % 3 == 2:
            ids = [*bodies[i - 2]["input_ids"], *ids[:40]]
        bodies.append({"input_ids": ids, "sampling_params": {"max_new_tokens": 24 + 5 * (i % 4)}})
    return bodies


def tokens(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module", params=sampled(CONFIGURATIONS, "none-paged", "EAGLE3-paged", "DFLASH"))
def configured(
    request: pytest.FixtureRequest, host: ServerHost, checkpoints: Checkpoints
) -> Iterator[Configured]:
    algorithm, extra = CONFIGURATIONS[request.param]
    server = host.start(*checkpoints.arguments(algorithm), *extra)
    yield Configured(request.param, algorithm, server)
    server.stop()


@pytest.fixture(scope="module")
def expected(host: ServerHost, checkpoints: Checkpoints) -> list[list[int]]:
    """Plain greedy decoding of :func:`requests`, one at a time, without a prefix cache."""
    server = host.start(*checkpoints.arguments("none"), "--disable-radix-cache")
    try:
        return tokens(server.generate_all(requests(), concurrency=1))
    finally:
        server.stop()


@pytest.fixture(scope="module")
def reference(checkpoints: Checkpoints) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(checkpoints.target, dtype=torch.float32).eval()


def test_the_configuration_is_the_one_asked_for(configured: Configured) -> None:
    info = configured.server.get("/server_info")
    backend = "torch_native" if configured.name == "torch_native" else "whiflash_cpu"
    assert info["attention_backend"] == backend
    assert info["sampling_backend"] == "pytorch"
    assert info["disable_overlap_schedule"] is True
    assert (info["speculative_algorithm"] or "none") == configured.algorithm


def test_sglangs_rust_server_starts(host: ServerHost, checkpoints: Checkpoints) -> None:
    """It refuses to where a scheduler sends anything beside tokens, as one of ours does."""
    with host.running(*checkpoints.arguments("none"), env={"SGLANG_RUST_SERVER": "1"}) as server:
        answer = server.generate(text="Hello", sampling_params={"max_new_tokens": 8})
    assert answer["meta_info"]["completion_tokens"] == 8


def test_greedy_tokens_equal_plain_decoding(configured: Configured, expected: list[list[int]]) -> None:
    """fp32, alone and in a batch of six whose members come and go, with prefix hits."""
    server = configured.server
    assert tokens(server.generate_all(requests()[:6], concurrency=1)) == expected[:6]
    batched = server.generate_all(requests(), concurrency=6)
    assert tokens(batched) == expected
    assert any(answer["meta_info"]["cached_tokens"] >= 16 for answer in batched)
    if configured.algorithm != "none":
        accepted = [answer["meta_info"]["spec_accept_length"] for answer in batched]
        assert max(accepted) > 1.2, f"no draft was ever right, so nothing was tested: {accepted}"


def test_logits_equal_hugging_face(configured: Configured, reference: LlamaForCausalLM) -> None:
    """Log-probabilities of the answers' tokens: after prefill, decoding or verification, alone and batched."""
    bodies = [body | {"return_logprob": True} for body in requests()[:7]]
    for concurrency in (1, 6):
        answers = configured.server.generate_all(bodies, concurrency=concurrency)
        for body, answer in zip(bodies, answers, strict=True):
            prompt, output = body["input_ids"], answer["output_ids"]
            with torch.inference_mode():
                logits = reference(torch.tensor([[*prompt, *output]])).logits[0]
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            wanted = logprobs.gather(1, torch.tensor(output)[:, None]).squeeze(1)
            found = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


def test_sampling(configured: Configured) -> None:
    """top_k = 1 leaves no choice, so it must give the greedy answer at any temperature; top_p leaves some."""
    server, prompt = configured.server, random_ids(7, 30)
    greedy = server.generate(input_ids=prompt, sampling_params={"max_new_tokens": 32})
    forced = {"max_new_tokens": 32, "temperature": 1.5, "top_k": 1}
    assert server.generate(input_ids=prompt, sampling_params=forced)["output_ids"] == greedy["output_ids"]
    free = {"max_new_tokens": 32, "temperature": 1.5, "top_p": 0.9}
    answers = [server.generate(input_ids=prompt, sampling_params=free)["output_ids"] for _ in range(4)]
    assert len({tuple(ids) for ids in answers}) > 1, "sampling at temperature 1.5 gave one answer only"
