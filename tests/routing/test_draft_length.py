"""Drafts as long as one more token is expected to pay for itself."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.arms.length import EDGES, DraftLength, chances
from whiflash_sglang.prices.costs import FULL_LENGTH, Worth


class Request(NamedTuple):
    """Fields of a batch that a drafter reads when it judges its drafts."""

    caps: torch.Tensor
    calibration: torch.Tensor


def cut(
    length: DraftLength, limits: list[int], worth: Worth, confidences: Sequence[Sequence[float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and chances of drafts with these confidences of each request."""
    batch: Any = Request(torch.tensor(limits), torch.tensor(length.calibration(worth)))
    return length.cut(torch.tensor(confidences), batch)


def test_full_length_where_nothing_is_priced() -> None:
    for limit in (8, 3):
        assert cut(DraftLength(), [limit], FULL_LENGTH, [[0.01] * 8])[0].tolist() == [limit]


def test_sure_drafts_are_longer() -> None:
    counts, _ = cut(DraftLength(), [8, 8], Worth(0.1), [[0.98] * 8, [0.35] * 8])
    assert counts[1] < counts[0] == 8


def test_chances_follow_what_is_accepted() -> None:
    rng, rates = random.Random(0), chances()
    assert rates.of(9) == pytest.approx(0.935)
    for _ in range(2000):
        rates.observe(9, rng.random() < 0.4)
    assert rates.of(9) == pytest.approx(0.4, abs=0.05)
    assert rates.of(0) == pytest.approx(0.05)


def test_only_tokens_with_a_verdict_count() -> None:
    length = DraftLength()
    length.observe(proposed=4, accepted=1, confidences=(0.95, 0.85, 0.75, 0.65))
    fresh = chances()
    assert length.chances.of(9) > fresh.of(9)
    assert length.chances.of(8) < fresh.of(8)
    assert length.chances.of(7) == fresh.of(7)


def test_one_request_does_not_shorten_anothers_draft() -> None:
    assert cut(DraftLength(), [8, 8], Worth(0.1), [[0.98] * 8, [0.15] * 8])[0].tolist() == [8, 1]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=1, max_size=5), st.floats(0, 2), st.data())
def test_counts_stay_within_the_limits(requests: list[list[float]], row: float, data: st.DataObject) -> None:
    limits = [data.draw(st.integers(1, 8)) for _ in requests]
    length = DraftLength()
    counts, _ = cut(length, limits, Worth(row), requests)
    for count, limit, confidences in zip(counts.tolist(), limits, requests, strict=True):
        alive, kept = 1.0, 0
        for confidence in confidences[:limit]:
            alive *= length.chances.of(bisect_right(EDGES, confidence))
            if kept and alive < row:
                break
            kept += 1
        assert 1 <= count == kept <= limit


def test_the_chance_that_a_whole_draft_is_accepted() -> None:
    length = DraftLength()
    counts, alive = cut(length, [8, 2], Worth(0.2), [[0.85, 0.75, 0.05, 0.05]] * 2)
    both = length.chances.of(8) * length.chances.of(7)
    assert counts.tolist() == [2, 2], "one ended where more did not pay, the other at its limit"
    assert alive[:, 1].tolist() == pytest.approx([both, both])
