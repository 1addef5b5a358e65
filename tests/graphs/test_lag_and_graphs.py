"""What serving promises, crossed: results at once or a round late, with every round replayed and with none.

Whole rounds of all arms, routed at random: greedy text is plain decoding's, the KV of the tree is one full pass's, and
sampled text has the target's distribution.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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

from whiflash_sglang.routing.costs import FULL_LENGTH, MeasuredCosts

SMALL: dict[str, Any] = {"max_running_requests": 5, "context_length": 96, "max_total_tokens": 2048}
ARRIVALS = mixed(17, 6, shared=12, longest=30, stops=0.3, tokens=24)


@contextmanager
def serving(
    models: Models, lag: int, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, OracleArm]]:
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
            yield e, oracle
            return
        with emulated_graphs(e) as captured:
            yield e, oracle
            assert len(captured.backend.replayed) == e.worker.clock.rounds
            assert captured.passes.replays > e.worker.clock.rounds / 2
            assert len(captured.committed) == e.worker.clock.rounds
            assert set(captured.committed) == {True, False}, "what is sampled is committed behind the graph"


@pytest.mark.parametrize(
    ("graphs", "lag"), sampled([(False, 0), (False, 1), (True, 0), (True, 1)], (True, 1))
)
def test_what_is_promised_holds(
    models: Models, monkeypatch: pytest.MonkeyPatch, lag: int, graphs: bool
) -> None:
    torch.manual_seed(0)
    plain = plain_texts(models.target, ARRIVALS, **SMALL)
    with serving(models, lag, graphs, monkeypatch) as (e, oracle):
        compare(models.reference.target, ARRIVALS, plain, play(e, ARRIVALS))
        assert assert_tree_is_true(e, models) > 50
        e.requests.clear()
        found = sample(e, oracle, {"top-k": PARAMETERS["top-k"]}, each=56, tokens=5)
        races = dict(e.streams.races) if lag else {}
    [sampled] = judge(models, found)
    print(
        f"chi² {sampled.test.statistic:.1f} at {sampled.test.freedom} degrees, p {sampled.test.p_value:.3f}"
    )
    assert sampled.test.p_value > 1e-4
    assert sampled.test.freedom >= 5
    assert not races


def in_one_place(kept: dict[int, torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """`value` where a captured graph would leave it: in memory that the next one of that size writes to."""
    return kept.setdefault(value.numel(), torch.empty_like(value)).copy_(value)


def record_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned of a round, as if it were packed in a graph."""
    from whiflash_sglang.round import learning

    kept: dict[int, torch.Tensor] = {}

    class Packed(learning.Download):
        def __init__(self, **fields: torch.Tensor) -> None:
            super().__init__(**fields)
            self.packed = in_one_place(kept, self.packed)

    monkeypatch.setattr(learning, "Download", Packed)


def results_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang reads, as the end of a graph leaves it."""
    from whiflash_sglang import worker
    from whiflash_sglang.device.transfers import Download

    class Uncopied(Download):
        def __getitem__(self, name: str) -> torch.Tensor:
            left: torch.Tensor | None = getattr(self.left, name, None)
            return super().__getitem__(name) if left is None else left

    pack = worker.results_of

    def uncopied(round: Any, committed: Any, signals: Any) -> Download:
        found = pack(round, committed, signals)
        found.__class__ = Uncopied
        found.left = committed  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(worker, "results_of", uncopied)


def states_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states for clients, as the graph of a verification leaves them."""
    from whiflash_sglang import worker

    def attach(batch: Any, verified: Any, stride: int) -> None:
        if batch.return_hidden_states:
            verified.output.hidden_states = verified.final_hidden[: len(batch.reqs) * stride]

    monkeypatch.setattr(worker.overlap, "attach", attach)


FAULTS = [record_in_one_place, results_of_the_graph, states_of_the_graph]


@pytest.mark.parametrize("fault", sampled(FAULTS, results_of_the_graph))
def test_a_result_that_the_next_replay_overwrites_is_found(
    models: Models, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    """Results are read when a round more has begun: what they lie in must be theirs alone."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    monkeypatch.setattr(MeasuredCosts, "worth", lambda self, arm: FULL_LENGTH)
    options = {"whiflash": models.whiflash("ar"), "host_lengths": False, **SMALL}
    with (
        overlapped(models.target, enable_return_hidden_states=True, **options) as e,
        emulated_graphs(e),
    ):
        for harmed in (False, True):
            if harmed:
                fault(monkeypatch)
            e.submit(f"harmed: {harmed}", list(range(20)), max_new_tokens=12, return_hidden_states=True)
            for _ in range(5):
                e.step()
            races = set(e.streams.races)
            assert bool(races) == harmed
            if not harmed:
                e.run()
        assert any(race.startswith("forward writes what copy reads") for race in races), races
