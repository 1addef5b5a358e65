"""EAGLE-3 of several layers: passes and catch-ups read nothing on the host and replay as they run, whole rounds too."""

import pytest
import torch
from histories import History, rounds
from host_reads import HostReads
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matrix import sampled
from model_set import Models, build_models
from plain import compare, plain_texts
from replay import Arms, load_arms
from test_draft_graphs import LONGEST, MOST, Captured, captured
from test_lag_and_graphs import ARRIVALS, SMALL, serving
from test_passes import prepared, requests
from traffic import play
from trees import assert_tree_is_true

from whiflash_sglang.cache.backlog import FeatureRows

__all__ = ["captured", "prepared"]


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Arms:
    return load_arms(tmp_path_factory.mktemp("layers"), eagle3_layers=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("models"), eagle3_layers=2)


def test_nothing_is_read_and_nothing_uploaded(arms: Arms) -> None:
    arm = arms.by_name["ar"]
    given, count = requests(arm, [20, 7, 90]), 12
    positions, owners = torch.arange(count), torch.arange(count) % 3 + 1
    features = torch.randn(count, arms.width)
    slots = given.slot_table[owners, positions].long()
    slots[-2:] = -1
    following = torch.zeros(count, dtype=torch.int64)
    rows = FeatureRows(features, positions, slots, following, owners, given.slot_table)
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
    captured.check_history(seed, history, late)


@pytest.mark.parametrize("lag", sampled([0, 1], 0))
def test_replayed_rounds_leave_the_kv_of_one_pass(
    models: Models, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """All arms at random, results at once or a round late, where catch-ups are padded."""
    plain = plain_texts(models.target, ARRIVALS, **SMALL)
    with serving(models, lag, True, monkeypatch) as (e, oracle, _):
        for arrival in ARRIVALS:
            oracle.learn(arrival.prompt, plain[arrival.rid])
        compare(models.reference.target, ARRIVALS, plain, play(e, ARRIVALS))
        e.generate([list(ARRIVALS[0].prompt)], max_new_tokens=12, temperature=1.0)
        assert assert_tree_is_true(e, models) > 50
        assert not lag or not e.streams.races
