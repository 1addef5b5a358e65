import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.telemetry.statistics import paired_ratio, percentiles_ms, rate


def test_percentiles() -> None:
    found = percentiles_ms([i / 1000 for i in range(1, 102)])
    assert found is not None
    assert (found.p50, found.p95, found.p99) == pytest.approx((51, 96, 100))
    assert percentiles_ms([]) is None


def test_rate_takes_the_median_repetition_of_every_prompt() -> None:
    tokens = np.array([[10.0, 10, 10], [30, 30, 30]])
    assert rate(tokens, np.array([[1.0, 2, 90], [3, 3, 3]])) == pytest.approx(40 / 5)


@given(factor=st.floats(0.2, 5), prompts=st.integers(1, 12), repetitions=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_drift_that_hits_both_arms_cancels_out(factor: float, prompts: int, repetitions: int, seed: int) -> None:
    """One arm is `factor` times as fast at every moment of a machine that gets faster and slower."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 200, size=(prompts, 1)).repeat(repetitions, axis=1).astype(float)
    seconds = tokens * rng.uniform(0.5, 2, size=tokens.shape)
    found = paired_ratio(tokens, seconds / factor, tokens, seconds, ["a"] * prompts, draws=200)
    assert (found.ratio, found.low, found.high) == pytest.approx((factor, factor, factor))


def test_interval_covers_the_true_ratio() -> None:
    """About 95 intervals of 100 measurements with independent noise hold the true ratio of 1.2."""
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(100):
        tokens = np.full((24, 3), 100.0)
        base = rng.lognormal(0, 0.4, size=(24, 1))
        seconds = base * rng.lognormal(0, 0.1, size=tokens.shape)
        faster = base / 1.2 * rng.lognormal(0, 0.1, size=tokens.shape)
        found = paired_ratio(tokens, faster, tokens, seconds, list("abcd" * 6), seed=seed, draws=500)
        held += found.low <= 1.2 <= found.high
    assert 88 <= held <= 100


def test_strata_keep_their_share() -> None:
    """Prompts of a category are alike here, so every draw that holds its share of each gives the same ratio."""
    tokens = np.full((4, 2), 50.0)
    seconds, other = np.repeat([1.0, 9.0], 2), np.repeat([2.0, 8.0], 2)
    pairs = tokens, seconds[:, None].repeat(2, axis=1), tokens, other[:, None].repeat(2, axis=1)
    kept = paired_ratio(*pairs, list("aabb"), draws=100)
    assert kept.low == kept.high == pytest.approx(1.0)
    mixed = paired_ratio(*pairs, ["a"] * 4, draws=100)
    assert mixed.low < 1.0 < mixed.high


def test_single_prompts_are_not_called_certain() -> None:
    tokens = np.full((3, 1), 50.0)
    other = np.array([[2.0], [5.0], [8.0]])
    found = paired_ratio(tokens, np.array([[1.0], [5.0], [9.0]]), tokens, other, ["a", "b", "c"], draws=200)
    assert found.low < 1.0 < found.high


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_ratio(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 2)), np.ones((2, 2)), ["a", "a"])
