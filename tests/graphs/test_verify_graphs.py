"""Verifications as graphs: their sizes, their memory, what cannot be captured, and what rounds learn of a replay.

Texts, grammars, penalties, log-probabilities and draft KV of replayed rounds are those of the rows `graphs` of
`tests/worker/test_plain_text.py`; positions in three dimensions are replayed in `tests/targets/test_images.py`.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from emulated import TapeBackend, emulated_graphs
from engine import Engine, engine
from model_set import Models
from op_tape import NotCapturableError
from oracle_arm import ARM, OracleArm

from whiflash_sglang.device.capture import MOST_DRAFTS, graded
from whiflash_sglang.engine.forward import graphs
from whiflash_sglang.engine.forward.graphs import PLAIN, bytes_for, most_rows, spare_slots
from whiflash_sglang.formats.router import Layers
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.core import Results
from whiflash_sglang.round import learning
from whiflash_sglang.round.ends import GraphEnds
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.routing.policies import Pinned

REQUESTS, WIDEST = 5, 17
PROMPTS = [[7] * 3, [1, 2, 3, 4, 5, 6], [9] * 17, [3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8]]
NEEDS = frozenset({"entropy", "delta"})
SMALL = {"max_running_requests": REQUESTS, "context_length": 96, "max_total_tokens": 1024}


@pytest.fixture(scope="module")
def started(models: Models) -> Iterator[tuple[Engine, OracleArm]]:
    """An engine whose rounds need all signals, with an arm that drafts full blocks and is mostly right."""
    oracle = OracleArm(0.9, max_drafts=WIDEST - 1)
    with engine(models.target, whiflash=models.whiflash("none"), arms=[oracle], **SMALL) as e:
        for prompt, text in zip(PROMPTS, e.generate(PROMPTS, max_new_tokens=40), strict=True):
            oracle.learn(prompt, text)
        stages, generator = e.worker.stages, torch.Generator().manual_seed(0)
        hidden = e.worker.target.shape.hidden_size
        shapes = (8, hidden), (8,), (3, 8), (3,)
        stages.signals._router = Layers(*(torch.randn(shape, generator=generator) for shape in shapes))
        with (
            patch.object(stages.ends, "_needs", lambda: NEEDS),
            patch.object(learning, "PLAIN_ENTROPY_ROUNDS", 1),
            patch.object(e.worker.target._text.logits_processor, "keep_last_hidden_states", True),
            patch.object(e.worker.controller, "worth", lambda: FULL_LENGTH),
        ):
            yield e, oracle


def learned(started: tuple[Engine, OracleArm], stops: Sequence[Sequence[int]]) -> list[Results]:
    """Return the results of every round of all prompts, each with its stop tokens."""
    (e, oracle), found, learn = started, list[Results](), Learner.learn

    def noted(learner: Learner, round_: Any, results: Results) -> None:
        found.append(results)
        learn(learner, round_, results)

    e.start_over("none")
    e.worker.controller.policy, oracle._random = Pinned(ARM, needs=NEEDS), random.Random(3)
    with patch.object(Learner, "learn", noted):
        for number, (prompt, ids) in enumerate(zip(PROMPTS, stops, strict=True)):
            name = f"{len(e.requests):04d}-{number}"
            e.submit(name, prompt, max_new_tokens=40, stop_token_ids=list(ids) or None, ignore_eos=not ids)
        e.run()
    return found


@contextmanager
def unwritten(e: Engine) -> Iterator[None]:
    """A graph that may not commit leaves texts and rings of all requests as they were; row 0 is the padding's."""
    replay, rings, ends = TapeBackend.replay, e.worker.sync.rings.rings, e.worker.stages.ends
    parts = e.worker.tokens.data, rings.features, rings.next_tokens

    def watched(self: TapeBackend, *args: Any, **named: Any) -> Any:
        before = [part[1:].clone() for part in parts]
        found = replay(self, *args, **named)
        assert ends._committing or all(map(torch.equal, before, (part[1:] for part in parts)))
        return found

    with patch.object(TapeBackend, "replay", watched):
        yield


def tokens_of(results: Results) -> list[Sequence[int]]:
    """Return each request's committed tokens."""
    return [row[:count] for row, count in zip(results.tokens, results.accept_lens, strict=True)]


@pytest.mark.parametrize("behind", [False, True])
def test_rounds_learn_of_a_replay_what_they_learn_of_an_eager_one(
    started: tuple[Engine, OracleArm], monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    """behind: rounds are committed behind their graphs, whose own ends must then leave no trace."""
    monkeypatch.setattr(started[0].worker.stages.verifier, "_checks", behind)
    target, tables = started[0].worker.target, started[0].worker.sync.rings.rings
    verify, kept = target.verify, [started[0].worker.tokens.data, tables.features, tables.next_tokens]

    def watched(*args: Any) -> Any:
        before = [table[1:].clone() for table in kept]
        verified = verify(*args)
        assert not behind or all(map(torch.equal, before, [table[1:] for table in kept]))
        return verified

    monkeypatch.setattr(target, "verify", watched)
    texts = [text[-40:] for text in started[1]._texts]
    stops: list[Sequence[int]] = [[texts[0][20]], [], [], [texts[3][25]], []]
    eager = learned(started, stops)
    with emulated_graphs(started[0]) as captured, unwritten(started[0]):
        replayed = learned(started, stops)
        assert len(captured.backend.replayed) == len(captured.committed) == len(replayed) == len(eager)
        assert set(captured.committed) == {not behind}
        sizes = captured.capture_num_tokens
        plain = {key.size for key in captured.backend.tapes if key.attention_variant == PLAIN}
        assert plain == {rows for rows in sizes if rows <= started[0].worker.target.rows_for(REQUESTS, REQUESTS)}
    assert sizes == graded(REQUESTS * WIDEST)
    assert len(set(captured.backend.replayed)) > 3
    for own, other in zip(replayed, eager, strict=True):
        assert tokens_of(own) == tokens_of(other)
        for name in ("entropy", "outputs"):
            of_both = (torch.tensor(getattr(each, name)) for each in (own, other))
            torch.testing.assert_close(*of_both, atol=1e-4, rtol=1e-4)


def test_a_batch_without_a_graph_is_verified_eagerly(
    started: tuple[Engine, OracleArm], monkeypatch: pytest.MonkeyPatch
) -> None:
    with emulated_graphs(started[0]) as captured:
        monkeypatch.setattr(captured, "requests", REQUESTS - 1)
        target = started[0].worker.target
        assert (target.rows_for(7, 5), target.rows_for(7, 4)) == (None, 8)
        found = learned(started, [[]] * REQUESTS)
        assert len(captured.backend.replayed) == sum(len(each.accept_lens) < REQUESTS for each in found) < len(found)


def test_an_epilogue_that_reads_the_device_is_no_end_of_a_graph(
    started: tuple[Engine, OracleArm], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = GraphEnds.capture

    def reading(self: GraphEnds, graph: Any, of_graph: Any) -> None:
        assert bool(of_graph().starts.max() > 0)
        capture(self, graph, of_graph)

    monkeypatch.setattr(GraphEnds, "capture", reading)
    with pytest.raises(NotCapturableError, match="reads"), emulated_graphs(started[0]):
        pass


@pytest.mark.parametrize("most_drafts", [MOST_DRAFTS, 30])
def test_what_is_reserved_for_graphs_is_what_they_keep(
    started: tuple[Engine, OracleArm], monkeypatch: pytest.MonkeyPatch, most_drafts: int
) -> None:
    """Also if there are fewer rows than all requests at their widest would have."""
    monkeypatch.setattr(graphs, "MOST_DRAFTS", most_drafts)
    with emulated_graphs(started[0]) as captured:
        outputs = captured.backend.outputs.values()
        vocabulary = started[0].worker.target.shape.vocab_size
        features = next(iter(outputs)).hidden_states
        row_bytes = features.shape[1] * features.itemsize
        kept = sum(output.hidden_states.untyped_storage().nbytes() for output in outputs)
        logits = {output.next_token_logits.untyped_storage()._cdata: output.next_token_logits for output in outputs}
        kept += sum(shared.untyped_storage().nbytes() for shared in logits.values())
        assert kept == bytes_for(REQUESTS, WIDEST, vocabulary=vocabulary, row_bytes=row_bytes)


@pytest.mark.parametrize(("requests", "widest"), [(1, 1), (1, 17), (8, 5), (48, 17), (48, 9), (256, 17)])
def test_sizes(requests: int, widest: int) -> None:
    """No batch is longer than its graph, none has a slot of more than `widest` rows, and few rows are padding."""
    buckets = graded(most_rows(requests, widest))
    spare = spare_slots(requests, widest)
    assert buckets == sorted(set(buckets))
    assert requests <= buckets[-1] <= min(requests * widest, requests + MOST_DRAFTS)
    for lower, upper in zip([0, *buckets], buckets, strict=False):
        assert upper - lower - 1 <= max(lower / 2, 1)
        slots = min(upper, requests + spare)
        for batch in range(1, min(requests, upper) + 1):
            leftover = upper - batch  # nothing was drafted
            assert slots > batch or leftover == 0
            assert leftover <= (slots - batch) * widest
