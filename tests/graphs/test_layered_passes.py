"""Passes and catch-ups of EAGLE-3 of several layers read nothing on the host, replay as they run, and keep its KV."""

import pytest
import torch
from host_reads import HostReads
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from op_tape import TapeRecorder
from replay import Arms, Replay, load_arms
from test_backlog import History, live, rounds
from test_draft_graphs import LONGEST, MOST, Captured, captured
from test_passes import prepared, requests

from whiflash_sglang.cache.backlog import FeatureRows, Owners

__all__ = ["captured", "prepared"]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    return load_arms(tmp_path_factory.mktemp("layers"), eagle3_layers=3)


def test_nothing_is_read_and_nothing_uploaded(arms: Arms) -> None:
    arm = arms.by_name["ar"]
    given, count = requests(arm, [20, 7, 90]), 12
    positions, owners = torch.arange(count), torch.arange(count) % 3 + 1
    features = torch.randn(count, arms.width)
    slots = given.slot_table[owners, positions].long()
    slots[-2:] = -1
    following = torch.zeros(count, dtype=torch.int64)
    rows = FeatureRows(features, positions, slots, following, Owners(owners, given.slot_table))
    with HostReads() as seen:
        arm.whole(given, arm.max_drafts)
        arm.catch_up(rows.of(arm.features))
    assert (seen.reads, seen.uploads) == ({}, {})


@settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=MOST), st.integers(1, 5))
def test_any_group(captured: Captured, lengths: list[int], most: int) -> None:
    captured.compare("ar", lengths, most)


@settings(
    deadline=None,
    max_examples=8,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**16), st.lists(rounds, min_size=1, max_size=6), st.sampled_from([0, 5]))
def test_any_history_equals_one_pass(captured: Captured, seed: int, history: History, late: int) -> None:
    """Catch-ups replayed, padded too: a padding row sees nothing and writes to slot 0."""
    with torch.no_grad():
        replay, recorder = Replay(captured.arms, seed, late=late), TapeRecorder()
        replay.capture(recorder)
        live(replay, history)
        assert recorder.replays
