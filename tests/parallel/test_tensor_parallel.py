"""Two ranks: text is plain decoding's with two ranks, and both do the same whatever their clocks and mail say."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, tiny_family
from matrix import sampled
from ranks_at_work import RankFailedError, on_ranks
from reference import Comparison, ReferenceTarget
from tensor_parallel import (
    ARRIVALS,
    RANKS,
    SAMPLE,
    Checkpoints,
    Outputs,
    Played,
    draws_alone,
    goes_astray,
    plainly,
    play_ours,
    play_plain,
    seeded,
    wild,
)
from traffic import Arrival


def check(model: Any, arrivals: list[Arrival], plain: Outputs, played: list[Played]) -> Played:
    """Both ranks did the same, and no request got another text than plain decoding gives (fp32, ties but for)."""
    first, second = played
    for number, (one, other) in enumerate(zip(first.rounds, second.rounds, strict=True)):
        assert one == other, f"round {number} of {len(first.rounds)}"
    assert first.outputs == second.outputs
    Comparison(model).check_all(arrivals, plain, first.outputs)
    return first


@pytest.mark.parametrize("count", sampled([SAMPLE, 200], SAMPLE))
def test_many_requests(checkpoints: Checkpoints, plain: Outputs, count: int) -> None:
    """All arms, shared prefixes, aborts, stops and retractions."""
    arrivals = ARRIVALS[:count]
    if count != SAMPLE:
        plain = plainly(checkpoints, count)
    work = partial(play_ours, checkpoints, "random", arrivals, plain, retract=2)
    found = check(ReferenceTarget(checkpoints.target), arrivals, plain, on_ranks(RANKS, work))
    assert found.arms >= {"ar", "diffusion", "lookup", "oracle", "none"}
    assert found.retracted
    assert found.cached
    assert found.accepted


def test_no_rank_but_the_first_looks_at_a_clock_or_its_mail(checkpoints: Checkpoints, plain: Outputs) -> None:
    """Four requests are sampled. Without seeds they draw from a generator that goes on alike in every rank."""
    arrivals = ARRIVALS[:12]
    random = [replace(a, params={"max_new_tokens": 16, "temperature": 1.0}) for a in ARRIVALS[12:16]]
    played = on_ranks(RANKS, partial(wild, checkpoints, [*arrivals, *random], plain))
    assert check(ReferenceTarget(checkpoints.target), arrivals, plain, played).accepted


@pytest.mark.evidence
def test_experts_on_two_ranks(tmp_path: Path) -> None:
    target = tmp_path / "target"
    model = tiny_family(target, FAMILIES["Qwen3MoeForCausalLM"])
    moe = Checkpoints.of(tmp_path, target)
    arrivals = ARRIVALS[:10]
    plain, again = on_ranks(RANKS, partial(play_plain, moe, arrivals, ep_size=RANKS))
    assert plain == again
    ours = partial(play_ours, moe, "random", arrivals, plain, retract=2, ep_size=RANKS)
    found = check(model, arrivals, plain, on_ranks(RANKS, ours))
    assert found.arms >= {"ar", "diffusion", "lookup", "oracle", "none"}
    assert found.accepted


@pytest.mark.evidence
def test_seeded_sampling(checkpoints: Checkpoints) -> None:
    """Noise is keyed by seed and position, so that tokens are those of plain decoding with as many ranks."""
    arrivals, seeds = seeded(1), {"enable_deterministic_inference": True}
    expected, again = on_ranks(RANKS, partial(play_plain, checkpoints, arrivals, **seeds))
    assert expected == again
    assert len({tuple(tokens) for tokens in expected.values()}) == len(arrivals)
    ours = partial(play_ours, checkpoints, "random", arrivals, expected, **seeds)
    first, second = on_ranks(RANKS, ours)
    assert first == second
    assert first.outputs == expected
    assert first.accepted


def test_a_rank_that_goes_astray_is_found_within_a_round(checkpoints: Checkpoints, tmp_path: Path) -> None:
    log = tmp_path / "rounds"
    with pytest.raises(RankFailedError, match="rank 1 of 2 did not commit what rank 0 did"):
        on_ranks(RANKS, partial(goes_astray, checkpoints, log))
    seen = log.read_text()
    assert "rank 1 verifies round 4\n" in seen
    assert "rank 1 verifies round 5\n" not in seen


def test_under_grammars_all_ranks_have_the_tokens_of_the_first(checkpoints: Checkpoints) -> None:
    """As SGLang's sampler sends them there."""
    first, second = on_ranks(RANKS, partial(draws_alone, checkpoints))
    assert first == second
    assert all(first.outputs.values())
