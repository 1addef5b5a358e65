"""Greedy text is plain decoding's where every verification and every pass of a drafter is replayed, whatever drafts."""

from dataclasses import replace

import pytest
from emulated import emulated_graphs
from engine import engine
from model_set import Models
from plain import compare, plain_texts
from traffic import mixed, play

SMALL = {"max_running_requests": 5, "context_length": 96, "max_total_tokens": 1024}
ARRIVALS = [
    replace(a, params=a.params | {"frequency_penalty": 0.3 * (i % 2)})
    for i, a in enumerate(mixed(11, 8, shared=12, longest=30, stops=0.3))
]
"""Half of them are sampled from adjusted logits, row by row."""


@pytest.mark.parametrize("router", ["random", "auto"])
def test_text_is_the_same_with_every_round_replayed(models: Models, router: str) -> None:
    plain = plain_texts(models.target, ARRIVALS, **SMALL)
    with engine(models.target, whiflash=models.whiflash(router), **SMALL) as e, emulated_graphs(e) as graphs:
        found, rounds = play(e, ARRIVALS), e.worker.clock.rounds
    replayed = graphs.backend.replayed
    assert graphs.passes.replays > rounds / 2
    assert len(replayed) == rounds > 0
    assert len(set(replayed)) > 5
    assert set(graphs.committed) == {True, False}, "penalised tokens are committed behind the graph"
    compare(models.reference.target, ARRIVALS, plain, found)
