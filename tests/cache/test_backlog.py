"""Any history of routes, accept lengths, aborts and retractions leaves what one full pass would have left.

Slots and watermarks exactly, KV within 1e-5 of its largest value in fp32 (matrix products round differently by
batch shape, so bit for bit cannot be asked).
"""

import random
from itertools import pairwise

import pytest
from histories import WIDEST, History, live, rounds
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import CONTEXT, RING, ROWS, Arms, Replay

from whiflash_sglang.cache.backlog import TOGETHER, Watermarks


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 2**16), st.lists(rounds, min_size=1, max_size=8), st.sampled_from([0, 5]))
def test_any_history_equals_one_pass(arms: Arms, seed: int, history: History, late: int) -> None:
    """Also where the host knows lengths only within `late` tokens, so that what it packs is padded."""
    live(Replay(arms, seed, late=late), history)


@pytest.mark.parametrize("pinned", ["ar", "diffusion", "none"])
def test_a_full_ring_is_flushed_and_not_before(arms: Arms, pinned: str) -> None:
    """The idle drafters lag until their ring could overflow, then catch up in one go."""
    replay = Replay(arms, seed=1)
    start = list(replay.lengths)
    lags = []
    while max(replay.lengths) < CONTEXT - WIDEST:
        replay.round([pinned] * ROWS, [3, 2, 1])
        lags.append(replay.lag(0))
    assert RING - WIDEST - 3 <= max(lags) <= RING, "flushed too early, or too late"
    flushes = sum(after < before for before, after in pairwise(lags))
    committed = replay.lengths[0] - start[0]
    assert flushes <= committed // (RING - 2 * WIDEST) + 1, "flushed more often than the ring asks for"
    for row in range(ROWS):
        replay.check(row)


def test_a_switch_costs_one_batch(arms: Arms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that choose the same drafter are ingested together, however far each of them lags."""
    replay = Replay(arms, seed=2)
    for _ in range(4):
        replay.round(["ar"] * ROWS, [1, 3, 2])
    batches: list[int] = []
    diffusion = replay.arms.by_name["diffusion"]
    ingest = diffusion.catch_up
    monkeypatch.setattr(diffusion, "catch_up", lambda rows: (batches.append(len(rows)), ingest(rows)))
    replay.round(["diffusion"] * ROWS, [1, 1, 1])
    assert batches == [4 * (1 + 3 + 2)]


def test_requests_that_leave_together_are_one_batch(arms: Arms, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far each lags, and who of them has nothing to ingest."""
    replay = Replay(arms, seed=4)
    for _ in range(3):
        replay.round(["ar"] * ROWS, [2, 1, 3])
    batches: list[int] = []
    diffusion = replay.arms.by_name["diffusion"]
    ingest = diffusion.catch_up
    monkeypatch.setattr(diffusion, "catch_up", lambda rows: (batches.append(len(rows)), ingest(rows)))
    for row in range(2):
        replay.sync.leave(row + 1, replay.lengths[row])
    assert not batches
    replay.sync.flush()
    assert batches == [3 * (2 + 1)]
    assert not replay.sync.leaving
    for row in range(ROWS):
        replay.check(row)


def test_what_is_paid_in_every_round_is_not_extra(arms: Arms) -> None:
    """A drafter that missed four rounds pays for three more than one that is used in each."""
    replay = Replay(arms, seed=3)
    for _ in range(4):
        replay.round(["ar"] * ROWS, [1, 3, 2])
    routes, known = ["diffusion"] * ROWS, replay.lengths
    due = replay.sync.due(range(1, ROWS + 1), known, known, routes, [1] * ROWS)
    replay.sync.seconds = {"diffusion": 2.0 * due["diffusion"][1]}
    assert replay.sync.beyond_usual(due, range(1, ROWS + 1), routes) == pytest.approx(2.0 * 3 * (1 + 3 + 2))


def test_watermarks_never_go_back() -> None:
    marks = Watermarks(["ar", "diffusion"], RING, rows=8)
    marks.reset(4, 10)
    marks.flushed(4, "ar", 12)
    with pytest.raises(ValueError, match="'ar' cannot go back from 12 to 11"):
        marks.flushed(4, "ar", 11)
    assert (marks.synced(4, "ar"), marks.synced(4, "diffusion")) == (12, 10)
    marks.forget(4)
    marks.forget(4)
    assert 4 not in marks.rows


def test_no_more_is_due_than_rounds_under_way_verify() -> None:
    """Every request may have committed its widest block, but all together no more than one verification's rows."""
    marks, rows = Watermarks(["ar"], 64, rows=32), range(32)
    for row in rows:
        marks.reset(row, 100)
    known = [101] * 32, [117] * 32
    assert marks.due("ar", rows, *known, [True] * 32, [17] * 32, 96) == (list(rows), 32 + 96)
    for row in rows:
        marks.reset(row, 100)
    assert marks.due("ar", rows, *known, [True] * 32, [17] * 32, 600) == (list(rows), 32 * 17)


def test_rings_that_are_half_full_join_a_flush() -> None:
    """Eight requests that began at different times are flushed together, and no pass has more tokens than one reads."""
    marks, rows, flushes = Watermarks(["ar"], 64, rows=8), range(8), list[int]()
    for row in rows:
        marks.reset(row, 100 - 8 * row)
    for n in range(100, 740):
        members, tokens = marks.due("ar", rows, [n] * 8, [n] * 8, [False] * 8, [1] * 8)
        flushes += [tokens] if members else []
    assert max(flushes) <= TOGETHER + 64
    assert len(flushes) <= 30, "each of them is flushed ten times"


def test_what_is_due_follows_choice_and_room() -> None:
    marks = Watermarks(["ar"], 16, rows=1)
    rng = random.Random(0)
    for _ in range(200):
        length, lag, width = rng.randint(20, 40), rng.randint(0, 16), rng.randint(1, 8)
        marks.reset(0, length - lag)
        chosen = rng.random() < 0.5
        parked = max(lag, 1)  # feature n-1 stays parked for the next chain
        wanted = lag > 0 and (chosen or parked + width > 16)
        assert marks.due("ar", [0], [length], [length], [chosen], [width]) == (([0], lag) if wanted else ([], 0))
        assert marks.synced(0, "ar") == (length if wanted else length - lag)
