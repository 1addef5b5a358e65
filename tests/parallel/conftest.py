"""Tiny checkpoints for the tests of several processes, and what plain decoding answers with two ranks."""

from functools import partial

import pytest
from ranks_at_work import on_ranks
from tensor_parallel import ARRIVALS, RANKS, SAMPLE, Checkpoints, Outputs, play_plain
from tiny_models import tiny_target


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """EAGLE-3 has a head of its own, DFlash chooses from the target's, which the ranks share."""
    root = tmp_path_factory.mktemp("parallel")
    return Checkpoints.of(root, tiny_target(root / "target"))


@pytest.fixture(scope="session")
def plain(checkpoints: Checkpoints) -> Outputs:
    """Plain decoding of the first of `ARRIVALS` with two ranks, which agree on it. Nothing is aborted there."""
    first, second = on_ranks(RANKS, partial(play_plain, checkpoints, ARRIVALS[:SAMPLE]))
    assert first == second
    return dict(first)
