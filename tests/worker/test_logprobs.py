"""Log-probabilities are plain decoding's, ids and values: of the output, the likeliest, given tokens, the prompt.

They belong to the logits that a token was sampled from: behind penalties, bias, grammar and processor, and divided by
the temperature unless SGLANG_RETURN_ORIGINAL_LOGPROB says otherwise.
"""

import random
from itertools import product
from typing import Any

import pytest
from engine import engine
from model_set import Models
from oracle_arm import OracleArm
from overlap import overlapped
from records import Logprobs, all_logprobs, assert_same_logprobs
from reference import TIE
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from traffic import Arrival, play

GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "values-only": {"top_logprobs_num": 0, "token_ids_logprob": None},
    "frequency": {"frequency_penalty": 0.6, "presence_penalty": 0.3, "top_logprobs_num": 1},
    "repetition": {"repetition_penalty": 1.3, "top_logprobs_num": 5, "token_ids_logprob": None},
    "bias": {"logit_bias": {"70": 2.0, "80": -3.0}, "top_logprobs_num": 0, "token_ids_logprob": [70]},
    "grammar": {"regex": "(red|green|blue)( (red|green|blue)){9}", "ignore_eos": False},
    "processor": {
        "custom_logit_processor": DisallowedTokensLogitsProcessor.to_str(),
        "custom_params": {"token_ids": [70, 73, 76]},
    },
    "stopped": {"stop": ["EE", "N", "I"]},
    "prompt-too": {"logprob_start_len": 0},
    "not-asked": {"return_logprob": False},
}
SAMPLED = {name: {"temperature": 0.8, **params} for name, params in GREEDY.items()}
FILTERED = {name: {"top_p": 0.8, "top_k": 20, **params} for name, params in SAMPLED.items()}
"""All of a batch alike: SGLang draws from sorted probabilities where any request of it filters them."""

OPTIONS: dict[str, Any] = {
    "enable_custom_logit_processor": True,
    "skip_tokenizer_init": False,
    "max_running_requests": 16,
}

CASES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any], bool]] = {
    "greedy": (GREEDY, {}, False),
    "sampled": (SAMPLED, {"enable_deterministic_inference": True}, False),
    "filtered": (FILTERED, {"enable_deterministic_inference": True}, False),
    "sampled-original": (SAMPLED, {"enable_deterministic_inference": True}, True),
    "beside-sampled": (GREEDY | {"sampled": {"temperature": 1.0}}, {}, False),
}
"""The requests of a batch, the server's options, and whether the environment asks for the original ones.

What is sampled can be compared where noise is keyed by position; elsewhere the greedy ones beside it can.
"""


def requests(kinds: dict[str, dict[str, Any]]) -> list[Arrival]:
    rng = random.Random(5)
    asked = {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [69, 75, 256]}
    return [
        Arrival(
            f"{name}-{i}",
            rng.randint(0, 6),
            tuple(rng.choices(range(32, 127), k=rng.randint(5, 30))),
            {"max_new_tokens": 24, "sampling_seed": i, **asked, **params},
        )
        for i in range(2)
        for name, params in kinds.items()
    ]


@pytest.mark.parametrize(
    ("case", "router"),
    [(case, "random") for case in CASES] + [("greedy", r) for r in ("ar", "diffusion", "auto", "none")],
)
def test_logprobs(models: Models, case: str, router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers import sampler

    kinds, options, original = CASES[case]
    monkeypatch.setattr(sampler, "SGLANG_RETURN_ORIGINAL_LOGPROB", original)
    arrivals = requests(kinds)
    compared = [a.rid for a in arrivals if a.params["return_logprob"]]
    if case == "beside-sampled":
        compared = [rid for rid in compared if not rid.startswith("sampled")]
    oracle = OracleArm(0.9, alphabet=range(32, 127))
    with engine(models.target, **OPTIONS, **options) as e:
        expected = play(e, arrivals)
        wanted: dict[str, Logprobs] = all_logprobs(e, compared)
    for a in arrivals:
        oracle.learn(a.prompt, expected[a.rid])
    arms = [oracle] if router == "random" else []
    with engine(models.target, whiflash=models.whiflash(router), arms=arms, **OPTIONS, **options) as e:
        play(e, arrivals)
        found = all_logprobs(e, compared)
    for rid in compared:
        assert_same_logprobs(found[rid], wanted[rid], rid)
    assert router != "random" or max(oracle.accepted) > 4


@pytest.mark.parametrize("loop", [engine, overlapped])
def test_scores_are_plain_decodings(models: Models, loop: Any) -> None:
    """Of prompts alone, at chosen positions or behind the last token, beside requests that decode."""
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
    found: list[dict[str, Any]] = []
    texts: list[dict[str, list[int]]] = []
    for flags in (None, models.whiflash("random"), models.whiflash("none")):
        with loop(models.target, whiflash=flags, **options) as e:
            outputs = play(e, arrivals)
            records = {rid: e.requests[rid].logprob for rid in outputs}
        found.append(
            {
                rid: [
                    [float(value) for row in rows or [] for value in row or ()]
                    for rows in (r.input_token_ids_logprobs_val, r.output_token_ids_logprobs_val)
                ]
                for rid, r in records.items()
            }
        )
        texts.append(outputs)
    plain, *ours = found
    assert texts[1:] == texts[:1] * 2
    assert [list(map(len, plain[f"r{i}"])) for i in range(3)] == [[9, 0], [0, 3], [0, 0]]
    for rid, records in plain.items():
        for one, values in product(ours, range(2)):
            assert one[rid][values] == pytest.approx(records[values], abs=TIE), rid
