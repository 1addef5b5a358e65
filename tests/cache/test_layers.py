"""EAGLE-3 of several layers: what is ingested attends over its own request's text, whatever was drafted in between."""

from collections.abc import Iterator

import pytest
import torch
from histories import History, live, rounds
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import ROWS, Arms, Replay, load_arms

from whiflash_sglang.arms.paged import MOST_ROWS, blocks_of
from whiflash_sglang.formats.choice import Choice


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    return load_arms(tmp_path_factory.mktemp("layers"), eagle3_layers=3)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 2**16), st.lists(rounds, min_size=1, max_size=8), st.sampled_from([0, 5]))
def test_any_history_equals_one_pass(arms: Arms, seed: int, history: History, late: int) -> None:
    """As in `test_backlog.py`: chunks, rounds of other arms, aborts, retractions, slots that move, padded rows."""
    live(Replay(arms, seed, late=late), history)


def test_drafts_behind_a_catch_up_are_those_of_a_fresh_request(arms: Arms) -> None:
    """Other arms draft for rounds, or this one is rejected; then it drafts as if the text had been its prompt."""
    replay = Replay(arms, seed=4)
    for _ in range(5):
        replay.round(["diffusion", "none", "ar"], [4, 1, 2])
    ingest(replay)
    caught_up = drafts(replay)
    for pool in (arms.by_name["ar"].kv.k, arms.by_name["ar"].kv.v):
        pool.fill_(torch.nan)
    for row, n in enumerate(replay.lengths):
        replay.sync.forget(row + 1)
        replay.prefill(row, 0, n)
    fresh = drafts(replay)
    assert torch.equal(caught_up.token, fresh.token)
    torch.testing.assert_close(caught_up.confidence, fresh.confidence)


def ingest(replay: Replay) -> None:
    """The catch-up of a round that all requests are routed to the chain in, and nothing else of it."""
    rows = list(range(1, ROWS + 1))
    due = replay.sync.due(rows, replay.lengths, replay.lengths, ["ar"] * ROWS, [1] * ROWS)
    assert due["ar"][1] > 20
    flags = torch.tensor(replay.sync.flags(due, ROWS))
    replay.sync.catch_up(due, flags, torch.tensor(rows), torch.tensor(replay.lengths))


def drafts(replay: Replay) -> Choice:
    """Whole chains of all requests."""
    arm = replay.arms.by_name["ar"]
    return arm.whole(replay.draft_batch(range(ROWS), arm), arm.max_drafts)


@pytest.mark.parametrize("runs", [None, [1], [7, 1, 300], [MOST_ROWS, 2 * MOST_ROWS + 5]])
def test_blocks_hold_every_row_once_and_no_two_requests(runs: list[int] | None) -> None:
    rows = sum(runs) if runs else 2 * MOST_ROWS + 3
    blocks = list(blocks_of(rows, runs))
    assert [row for begin, end, _ in blocks for row in range(begin, end)] == list(range(rows))
    assert all(end - begin <= MOST_ROWS and (end - begin) % width == 0 for begin, end, width in blocks)
    owner = [i for i, run in enumerate(runs or [1] * rows) for _ in range(run)]
    for begin, end, width in blocks:
        for first in range(begin, end, width):
            assert len(set(owner[first : first + width])) == 1
    assert {width for _, _, width in blocks} <= ({1} if runs is None else {1 << i for i in range(8)})
