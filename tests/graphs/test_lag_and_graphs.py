"""Promises of serving, crossed: results at once or a round late, with every round replayed and with none.

Whole rounds of all arms, routed at random: greedy and penalised text is plain decoding's, the KV of the tree is one
full pass's, and sampled text has the target's distribution.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import emulated_graphs
from engine import Engine, engine
from matrix import sampled
from model_set import Models
from oracle_arm import OracleArm
from overlap import overlapped
from plain import compare, plain_texts
from test_sampling import PARAMETERS, judge, sample
from traffic import mixed, play
from trees import assert_tree_is_true

from whiflash_sglang.engine.forward.graphs import VerifyGraphs
from whiflash_sglang.prices.costs import FULL_LENGTH, MeasuredCosts

SMALL: dict[str, Any] = {"max_running_requests": 5, "context_length": 96, "max_total_tokens": 2048}
ARRIVALS = [
    replace(a, params=a.params | {"frequency_penalty": 0.3 * (i % 2)})
    for i, a in enumerate(mixed(17, 6, shared=12, longest=30, stops=0.3, tokens=24))
]
"""Half of them are sampled from adjusted logits, row by row."""


@contextmanager
def serving(
    models: Models, lag: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, OracleArm, VerifyGraphs | None]]:
    """An engine whose host plans behind its device by `lag` rounds; all that runs in it is replayed, or nothing."""
    oracle = OracleArm(0.9, seed=4)
    monkeypatch.setattr(MeasuredCosts, "worth", lambda self, arm: FULL_LENGTH)
    options = {"whiflash": models.whiflash("random"), "arms": [oracle], **SMALL}
    if lag:
        monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
        started = overlapped(models.target, host_lengths=False, **options)
    else:
        started = engine(models.target, **options)
    with started as e:
        if not graphs:
            yield e, oracle, None
            return
        with emulated_graphs(e) as captured:
            yield e, oracle, captured
            assert len(captured.backend.replayed) == e.worker.clock.rounds
            assert len(set(captured.backend.replayed)) > 5
            assert captured.passes.replays > e.worker.clock.rounds / 2
            assert len(captured.committed) == e.worker.clock.rounds


@pytest.mark.parametrize(
    ("graphs", "lag"), sampled([(False, 0), (False, 1), (True, 0), (True, 1)], (True, 1))
)
def test_what_is_promised_holds(
    models: Models, monkeypatch: pytest.MonkeyPatch, lag: int, graphs: bool
) -> None:
    torch.manual_seed(0)
    plain = plain_texts(models.target, ARRIVALS, **SMALL)
    with serving(models, lag, graphs, monkeypatch) as (e, oracle, captured):
        compare(models.reference.target, ARRIVALS, plain, play(e, ARRIVALS))
        played = len(captured.committed) if captured else 0
        assert assert_tree_is_true(e, models) > 50
        e.requests.clear()
        found = sample(e, oracle, {"top-k": PARAMETERS["top-k"]}, each=56, tokens=5)
        races = dict(e.streams.races) if lag else {}
        if captured is not None:
            assert set(captured.committed[:played]) == {True, False}, (
                "penalties are committed behind the graph"
            )
            assert set(captured.committed[played:]) == {True}, (
                "what is sampled is committed in the graph, too"
            )
    [sampled] = judge(models, found)
    print(
        f"chi² {sampled.test.statistic:.1f} at {sampled.test.freedom} degrees, p {sampled.test.p_value:.3f}"
    )
    assert sampled.test.p_value > 1e-4
    assert sampled.test.freedom >= 5
    assert not races
