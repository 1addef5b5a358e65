"""Custom logit processors see the text as plain decoding shows it to them, and their neighbours go on drafting."""

import random
from typing import Any

import pytest
import torch
from engine import engine
from model_set import Models
from oracle_arm import OracleArm
from records import Logprobs, all_logprobs, assert_same_logprobs
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    DeepseekOCRNoRepeatNGramLogitProcessor,
    DisallowedTokensLogitsProcessor,
    ThinkingBudgetLogitProcessor,
)
from tiny_models import FAVOURED_TOKENS
from traffic import Arrival, play

THINK, THOUGHT, NEWLINE = 5, 6, 10


class TinyThinkingBudget(ThinkingBudgetLogitProcessor):
    """SGLang's own, for a tokenizer of bytes."""

    THINKING_START_TOKEN_ID = THINK
    THINKING_END_TOKEN_ID = THOUGHT
    NEW_LINE_TOKEN_ID = NEWLINE


class Counting(CustomLogitProcessor):
    """Keeps state between calls: it forbids a token at every third one."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            params["calls"] = params.get("calls", 0) + 1
            if params["calls"] % 3 == 0:
                logits[row, logits[row].argmax()] = -torch.inf
        return logits


PROCESSORS: dict[str, tuple[type[CustomLogitProcessor], dict[str, Any]]] = {
    "thinking": (TinyThinkingBudget, {"thinking_budget": 9}),
    "no-bigram-twice": (DeepseekOCRNoRepeatNGramLogitProcessor, {"ngram_size": 2, "window_size": 60}),
    "disallowed": (DisallowedTokensLogitsProcessor, {"token_ids": list(FAVOURED_TOKENS[::2])}),
    "counting": (Counting, {}),
}
NEIGHBOUR = "neighbour"
TOKENS = 30
OPTIONS: dict[str, Any] = {"enable_custom_logit_processor": True, "max_running_requests": 6}


def requests() -> list[Arrival]:
    rng = random.Random(4)
    arrivals = []
    for i in range(2):
        for name, (processor, params) in PROCESSORS.items():
            extra = {"custom_logit_processor": processor.to_str(), "custom_params": dict(params)}
            prompt = (*rng.choices(range(32, 127), k=rng.randint(6, 20)), THINK)
            arrivals.append(_request(f"{name}/{i}", rng.randint(0, 10), prompt, **extra))
        prompt = tuple(rng.choices(range(32, 127), k=12))
        arrivals.append(_request(f"{NEIGHBOUR}/{i}", rng.randint(0, 10), prompt))
    return arrivals


def _request(rid: str, step: int, prompt: tuple[int, ...], **params: Any) -> Arrival:
    return Arrival(rid, step, prompt, {"max_new_tokens": TOKENS, "return_logprob": True, **params})


@pytest.fixture(scope="module")
def plain(models: Models) -> tuple[dict[str, list[int]], dict[str, Logprobs]]:
    with engine(models.target, **OPTIONS) as e:
        outputs = play(e, requests())
        return outputs, all_logprobs(e, outputs)


@pytest.mark.parametrize("router", ["ar", "diffusion", "lookup", "auto", "random", "none"])
def test_text_and_logprobs_are_those_of_plain_decoding(models: Models, plain: Any, router: str) -> None:
    outputs, wanted = plain
    arrivals = requests()
    oracle = OracleArm(0.9)
    for a in arrivals:
        oracle.learn(a.prompt, outputs[a.rid])
    arms = [oracle] if router == "random" else []
    with engine(models.target, whiflash=models.whiflash(router), arms=arms, **OPTIONS) as e:
        assert play(e, arrivals) == outputs
        found = all_logprobs(e, outputs)
        for rid in outputs:
            assert_same_logprobs(found[rid], wanted[rid], rid)
        for rid in outputs:
            rounds, accepted = e.rounds(rid)
            if rid.startswith(NEIGHBOUR):
                assert accepted > 0 or router != "random"
            else:
                assert (rounds, accepted) == (TOKENS - 1, 0), "a block of such a request cannot be judged"


def test_the_processors_do_something(models: Models, plain: Any) -> None:
    outputs, _ = plain
    free = [Arrival(a.rid, a.step, a.prompt, {"max_new_tokens": TOKENS}) for a in requests()]
    with engine(models.target, **OPTIONS) as e:
        without = play(e, free)
    for rid in outputs:
        assert (without[rid] == outputs[rid]) == rid.startswith(NEIGHBOUR)
