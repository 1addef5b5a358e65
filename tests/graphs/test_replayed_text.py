"""Greedy text is plain decoding's where every verification and every pass of a drafter is replayed, whatever drafts."""

from dataclasses import replace

import pytest
from emulated import emulated_graphs
from engine import engine
from model_set import Models
from test_losslessness import compare
from test_strands import ChainFirst, Seen, seen, with_sources
from traffic import mixed, play

__all__ = ["seen"]

SMALL = {"max_running_requests": 5, "context_length": 96, "max_total_tokens": 1024}
ARRIVALS = [
    replace(a, params=a.params | {"frequency_penalty": 0.3 * (i % 2)})
    for i, a in enumerate(mixed(11, 8, shared=12, longest=30, stops=0.3))
]
"""Half of them are sampled from adjusted logits, row by row."""

Outputs = dict[str, list[int]]


@pytest.fixture(scope="module")
def plain(models: Models) -> Outputs:
    with engine(models.target, **SMALL) as e:
        return play(e, ARRIVALS)


@pytest.mark.parametrize("router", ["random", "auto"])
def test_text_is_the_same_with_every_round_replayed(models: Models, plain: Outputs, router: str) -> None:
    with engine(models.target, whiflash=models.whiflash(router), **SMALL) as e, emulated_graphs(e) as graphs:
        found, rounds = play(e, ARRIVALS), e.worker.clock.rounds
    replayed = graphs.backend.replayed
    assert graphs.passes.replays > rounds / 2
    assert len(replayed) == rounds > 0
    assert len(set(replayed)) > 5
    assert set(graphs.committed) == {True, False}, "penalised tokens are committed behind the graph"
    compare(models, ARRIVALS, plain, found)


def test_a_graph_commits_no_rows_of_strands(models: Models, seen: Seen) -> None:
    """Its end takes them for requests."""
    arrivals = mixed(11, 3, shared=12, longest=30, tokens=60)
    with engine(models.target, **SMALL) as e:
        plain = play(e, arrivals)
    flags, arms = models.whiflash("random", whiflash_branches=3), with_sources(arrivals, plain)
    with engine(models.target, whiflash=flags, arms=arms, **SMALL) as e, emulated_graphs(e) as graphs:
        e.worker.controller.policy = ChainFirst()
        found = play(e, arrivals)
    compare(models, arrivals, plain, found)
    assert seen.won
    assert set(graphs.committed) == {True, False}
