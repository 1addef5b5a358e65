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
from whiflash_sglang.prices.costs import FULL_LENGTH, MeasuredCosts, Worth
from whiflash_sglang.prices.round_clock import RoundTime


class Request(NamedTuple):
    """Fields of a batch that a drafter reads when it judges its drafts."""

    limits: list[int]
    caps: torch.Tensor
    calibration: torch.Tensor
    worth: Worth


def asked(length: DraftLength, limits: list[int], worth: Worth) -> Any:
    return Request(limits, torch.tensor(limits), torch.tensor(length.calibration(worth)), worth)


def chain(
    length: DraftLength, batch: Any, confidences: Sequence[Sequence[float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chain's counts and chances, as long as another pass pays, with the confidences given for each request."""
    columns = torch.tensor(confidences).T
    passes = 1
    while passes < len(columns) and length.goes_on(list(columns[:passes]), batch):
        passes += 1
    return length.cut(columns[:passes].T, batch)


def grow(length: DraftLength, worth: Worth, confidences: list[float], limit: int = 8) -> int:
    """Drafts of one request whose every token has the confidence given for its depth."""
    counts, _ = chain(length, asked(length, [limit], worth), [confidences])
    return int(counts[0])


def test_full_length_where_nothing_is_priced() -> None:
    assert grow(DraftLength(), FULL_LENGTH, [0.01] * 8) == 8
    assert grow(DraftLength(), FULL_LENGTH, [0.01] * 8, limit=3) == 3


def test_sure_drafts_are_longer() -> None:
    worth = Worth(row=0.1, draft=0.1)
    sure, unsure = (grow(DraftLength(), worth, [c] * 8) for c in (0.98, 0.35))
    assert unsure < sure == 8


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
    length = DraftLength()
    batch = asked(length, [8, 8], Worth(row=0.1, draft=0.0))
    assert chain(length, batch, [[0.98] * 8, [0.15] * 8])[0].tolist() == [8, 1]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=1, max_size=5),
    st.floats(0, 2),
    st.floats(0, 2),
    st.data(),
)
def test_counts_stay_within_the_limits(
    requests: list[list[float]], row: float, draft: float, data: st.DataObject
) -> None:
    limits = [data.draw(st.integers(1, 8)) for _ in requests]
    length = DraftLength()
    batch = asked(length, limits, Worth(row, draft))
    (whole, _), (counts, _) = length.cut(torch.tensor(requests), batch), chain(length, batch, requests)
    for count, full, limit, confidences in zip(
        counts.tolist(), whole.tolist(), limits, requests, strict=True
    ):
        alive, kept = 1.0, 0
        for confidence in confidences[:limit]:
            alive *= length.chances.of(bisect_right(EDGES, confidence))
            if kept and alive < row:
                break
            kept += 1
        assert 1 <= count <= full == kept <= limit


def test_a_slow_drafter_must_bring_more() -> None:
    costs = MeasuredCosts({"ar": 6}.__getitem__)
    assert costs.worth("ar") == FULL_LENGTH
    for _ in range(20):
        drafts = [("ar", 1, 5, 0.010, 0.001)]
        costs.observe(RoundTime(6, 1, tokens=2, seconds=0.026, drafting=0.011, drafts=drafts))
    worth = costs.worth("ar")
    assert worth.draft == pytest.approx(2 / 0.026 * 0.002)
    assert worth.row == pytest.approx(2 / 0.026 * 0.015 * 0.03)


def test_the_chance_that_a_whole_draft_is_accepted() -> None:
    length = DraftLength()
    batch = asked(length, [8, 2], Worth(row=0.2, draft=0.0))
    counts, alive = chain(length, batch, [[0.85, 0.75, 0.05, 0.05]] * 2)
    both = length.chances.of(8) * length.chances.of(7)
    assert counts.tolist() == [2, 2], "one ended where more did not pay, the other at its limit"
    assert alive[:, 1].tolist() == pytest.approx([both, both])
