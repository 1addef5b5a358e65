"""Two ranks without overlap: experts, and what one rank does otherwise. All else: `test_overlapping_ranks.py`."""

from functools import partial
from pathlib import Path

import pytest
from families import FAMILIES, tiny_family
from ranks_at_work import RankFailedError, on_ranks
from reference import Comparison
from tensor_parallel import ARRIVALS, RANKS, Checkpoints, draws_alone, goes_astray, play_ours, play_plain


@pytest.mark.evidence
def test_experts_on_two_ranks(tmp_path: Path) -> None:
    target = tmp_path / "target"
    model = tiny_family(target, FAMILIES["Qwen3MoeForCausalLM"])
    moe = Checkpoints.of(tmp_path, target)
    arrivals = ARRIVALS[:10]
    plain, again = on_ranks(RANKS, partial(play_plain, moe, arrivals, ep_size=RANKS))
    assert plain == again
    ours = partial(play_ours, moe, "random", arrivals, plain, retract=2, ep_size=RANKS)
    found, other = on_ranks(RANKS, ours)
    assert found == other
    Comparison(model).check_all(arrivals, plain, found.outputs)
    assert found.arms >= {"ar", "diffusion", "oracle", "none"}
    assert found.accepted


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
