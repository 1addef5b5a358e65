"""The end of a verification's graph commits what the same functions commit behind it, or nothing where it may not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulated import emulated_graphs
from model_set import Models
from op_tape import NotCapturableError
from test_verify_graphs import REQUESTS, WIDEST, Bench, Stopped, decoding, layouts
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.cache.tokens import FEW, NO_TOKEN, StopTable
from whiflash_sglang.device.transfers import Upload
from whiflash_sglang.formats.router import Layers
from whiflash_sglang.records.core import Verified
from whiflash_sglang.round.epilogue import Epilogue

CASES = [[3, 1, 5], [2, 2, 2, 4], [WIDEST] * 2, [1] * REQUESTS, [9, 1, WIDEST, 4, 7]]


class Commits(Bench):
    """Verifies and commits the same text with any widths and drafts, and puts everything back."""

    def __init__(self, stopped: Stopped, graphs: Any) -> None:
        super().__init__(stopped[0], graphs, stopped[1])
        worker = stopped[0].worker
        self.epilogue: Epilogue = worker.stages.epilogue
        self.stops: StopTable = worker.stages.epilogue._stops
        rings = worker.sync.rings.rings
        self._kept = [worker.tokens.data, rings.features, rings.next_tokens]
        self.right = torch.zeros((REQUESTS, WIDEST), dtype=torch.int64)

    def answer(self) -> None:
        """Find `right`, the target's own tokens of every request."""
        for column in range(WIDEST):
            rows, _ = self._verified([WIDEST] * REQUESTS, self.right[:, :-1], REQUESTS * WIDEST, False)
            self.right[:, column] = rows.logits.argmax(-1).view(REQUESTS, WIDEST)[:, column]

    def stop(self, row: int, stops: Sequence[int]) -> None:
        """A request with these stops begins in `row`."""
        upload = Upload()
        self.stops.begin(upload, row, stops)
        upload.send(torch.device("cpu"))

    def drafts(self, widths: Sequence[int]) -> torch.Tensor:
        """The target's own tokens, each request's up to another place."""
        generator = torch.Generator().manual_seed(sum(widths))
        drafts = self.right[: len(widths), : max(widths) - 1].clone()
        for own, width in zip(drafts, widths, strict=True):
            wrong = int(torch.randint(width, (), generator=generator))
            if wrong < width - 1:
                own[wrong] = (own[wrong] + 1) % 256
        return drafts

    def _verified(
        self, widths: Sequence[int], drafts: torch.Tensor, rows: int, greedy: bool
    ) -> tuple[Verified, list[int]]:
        batch, count = self._first(len(widths)), len(widths)
        verify_lens = torch.tensor(widths, dtype=torch.int32)
        request_rows = batch.req_pool_indices.long()
        block = prepare_mixed_block(
            torch.arange(60, 60 + count),
            drafts,
            verify_lens,
            batch.seq_lens,
            request_rows,
            self.target.slot_table,
            rows=rows,
        )
        row_ids = request_rows.tolist()
        self.epilogue.let_graphs_commit(greedy, row_ids)
        verified = self.target.verify(batch, block, verify_lens, None, WIDEST)
        if verified.committed is None:
            verified = verified._replace(predictions=verified.logits.argmax(-1))
        return verified._replace(request_rows=request_rows), row_ids

    def committed(self, widths: Sequence[int], *, in_graph: bool) -> list[torch.Tensor]:
        """Results and signals of a round of greedy tokens, and every request's text and rings after it."""
        before = [*self._pools, *self._kept]
        copies = [tensor.clone() for tensor in before]
        rows = self.target.rows_for(sum(widths), len(widths))
        verified, row_ids = self._verified(widths, self.drafts(widths), rows, greedy=in_graph)
        assert (verified.committed is not None) == in_graph
        committed = self.epilogue.commit(verified, WIDEST)
        self.epilogue.park(verified, committed)
        signals = self.epilogue.signals(verified, committed, {"entropy", "delta"})
        found = [t.clone() for t in (*committed, *signals.values(), *(kept[row_ids] for kept in self._kept))]
        for tensor, copy in zip(before, copies, strict=True):
            tensor.copy_(copy)
        return found

    def compare(self, widths: Sequence[int], pad_slot: int = 0) -> None:
        """The graph's with what runs behind it."""
        in_graph = self.committed(widths, in_graph=True)
        behind = self.committed(widths, in_graph=False)
        for a, b in zip(in_graph, behind, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def stopped(models: Models) -> Iterator[Stopped]:
    with decoding(models.target, models.whiflash("none")) as found:
        epilogue, target = found[0].worker.stages.epilogue, found[0].worker.target
        hidden, generator = target.shape.hidden_size, torch.Generator().manual_seed(0)
        target._text.logits_processor.keep_last_hidden_states = True
        epilogue._needs = lambda: {"entropy", "delta"}
        epilogue._router = Layers(
            *(torch.randn(shape, generator=generator) for shape in ((8, hidden), (8,), (3, 8), (3,)))
        )
        yield found


@pytest.fixture(scope="module")
def right(stopped: Stopped) -> torch.Tensor:
    """The target's text, 17 tokens of every request."""
    with emulated_graphs(stopped[0]) as graphs:
        found = Commits(stopped, graphs)
        found.answer()
        return found.right


@contextmanager
def commits(stopped: Stopped, right: torch.Tensor | None = None) -> Iterator[Commits]:
    """Every graph captured. right: the drafts are wrong from a random place on, without it everywhere."""
    with emulated_graphs(stopped[0]) as graphs:
        found = Commits(stopped, graphs)
        if right is not None:
            found.right = right
        yield found


def test_every_graph_commits_what_is_committed_behind_it(stopped: Stopped, right: torch.Tensor) -> None:
    accepted = set()
    with commits(stopped, right) as b:
        buckets = b.graphs.capture_num_tokens
        for widths in [*layouts(buckets), *CASES]:
            b.compare(widths)
            accepted |= set(b.committed(widths, in_graph=True)[0].tolist())
        assert set(b.graphs.backend.replayed) >= set(buckets)
    assert {1, 2, WIDEST} <= accepted


def test_a_graph_that_may_not_commit_leaves_everything_as_it_was(
    stopped: Stopped, right: torch.Tensor
) -> None:
    """Tokens are sampled, so what the graph would take are others."""
    with commits(stopped, right) as b:
        for widths in CASES:
            rows = b.target.rows_for(sum(widths), len(widths))
            before, replays = [kept[1:].clone() for kept in b._kept], len(b.graphs.backend.replayed)
            verified, _ = b._verified(widths, b.drafts(widths), rows, greedy=False)
            assert verified.committed is None
            assert b.graphs.backend.replayed[replays:] == [rows]
            for kept, copy in zip(b._kept, before, strict=True):
                assert torch.equal(kept[1:], copy)


def test_a_block_ends_at_a_stop_in_a_graph_too(stopped: Stopped, right: torch.Tensor) -> None:
    """A batch with a request that has many stops is committed after the graph, and its neighbours' stops stay."""
    widths = [9, 9, 9]
    with commits(stopped, right) as b:
        rows = b._batch.req_pool_indices.tolist()
        lengths, tokens = b.committed(widths, in_graph=True)[:2]
        cut = int(lengths.argmax())
        assert lengths[cut] > 1
        b.stop(rows[cut], [int(tokens[cut, 0])])
        try:
            b.compare(widths)
            assert b.committed(widths, in_graph=True)[0][cut] == 1
            b.stop(rows[cut - 1], range(300, 300 + FEW + 1))
            with pytest.raises(AssertionError):
                b.committed(widths, in_graph=True)
            assert b.committed(widths, in_graph=False)[0][cut] == 1
            b.stop(rows[cut - 1], [])
            b.compare(widths)
            assert b.committed(widths, in_graph=True)[0][cut] == 1
            b.stop(rows[cut], [])
            assert torch.equal(b.stops.few, b.stops.data[:, :FEW])
            assert (b.stops.few[rows] == NO_TOKEN).all()
            b.compare(widths)
            assert torch.equal(b.committed(widths, in_graph=True)[0], lengths)
        finally:
            for row in rows:
                b.stop(row, [])


CAPTURE = Epilogue.capture


def test_an_epilogue_that_reads_the_device_is_no_end_of_a_graph(
    stopped: Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(self: Epilogue, graph: Any, rows: Verified) -> None:
        assert bool(rows.starts.max() > 0)
        CAPTURE(self, graph, rows)

    monkeypatch.setattr(Epilogue, "capture", reading)
    with pytest.raises(NotCapturableError, match="reads"), commits(stopped):
        pass
