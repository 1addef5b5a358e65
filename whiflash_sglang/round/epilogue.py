"""The device's work after the target's forward: sampling, accepting, parking, and the signals of policies.

Imports no SGLang.

It is a function of a verification's packed rows, captured as the end of every verification's graph, and once more in a
graph of its own for what is sampled under masks or penalties, which is replayed when the masks are made. If SGLang's
sampler draws, it runs as it is written. Results of a graph hold until the next replay: packing the round's download
copies them.

A graph cannot leave its end out. If it must not commit, it does so for request row 0, which is nobody's and for which
nothing is sampled: in it the rows are multiplied by a number on the device, which is 0 then.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from whiflash_kernels import (
    Committed,
    PenaltyTable,
    SamplingTable,
    accept_and_commit,
    penalise_rows,
    router_mlp,
    routing_stats,
    sample_rows,
)

from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.cache.penalties import PenaltyRows
from whiflash_sglang.cache.tokens import NO_TOKEN, StopTable
from whiflash_sglang.device.capture import CapturedPass, Recorder
from whiflash_sglang.device.transfers import mask_places, masks_of_places
from whiflash_sglang.formats.router import Layers
from whiflash_sglang.records.core import Verified

GATE_BYTES = torch.int64.itemsize
"""Bytes of the scalar that lets graphs commit; every epilogue has one."""


Signals = dict[str, torch.Tensor]
Masks = tuple[torch.Tensor, torch.Tensor]
Graph = tuple[int, int]
"""A verification's graph: its runner, and rows."""
Outcome = tuple[Committed, Signals]


class Epilogue:
    """Commits verified rows.

    Args:
        rings: where features are parked. text: `TokenTable.data`. sampling: `SamplingRows.data`. router: of the bundle,
            None where no policy may need one. widest: most rows of a request. needs: what the policy reads now; a
            graph computes what it was when it was captured, and what a later policy needs beside it is computed
            behind the graph.
    """

    def __init__(
        self,
        rings: FeatureRings,
        text: torch.Tensor,
        stops: StopTable,
        sampling: SamplingTable,
        penalties: PenaltyRows,
        router: Layers | None,
        widest: int,
        needs: Callable[[], Collection[str]],
    ) -> None:
        self._rings, self._text, self._stops, self._router = rings, text, stops, router
        self._sampling, self.penalties = sampling, penalties
        self._widest, self._needs = widest, needs
        self._commits = torch.zeros((), dtype=torch.int64, device=text.device)
        self._committing = False  # what the device was last sent
        self._few = False  # whether the batch has no more stops, and penalties, than graphs read
        self._captured: dict[Graph, Outcome] = {}
        self._rows: dict[Graph, Callable[[], Verified]] = {}
        self._ends: dict[tuple[bool, bool], CapturedPass[Outcome]] = {}  # by whether masked, and penalised

    @staticmethod
    def bytes_for(widest: int) -> int:
        """Bytes that a graph and the ends behind it keep of one request, of which there are no more than rows."""
        committed = (widest + 3) * torch.int64.itemsize + torch.int32.itemsize
        return 4 * (committed + (1 + 3) * torch.float32.itemsize)  # entropy, and a router's outputs

    @staticmethod
    def mask_bytes(rows: int, vocabulary: int) -> int:
        """Bytes of the masks that ends of graphs of up to so many rows read."""
        words = -(-vocabulary // 32)
        return (masks_of_places(rows, words) + 1 + rows) * words * torch.int32.itemsize

    def capture(self, graph: Graph, of_graph: Callable[[], Verified]) -> None:
        """Issue all of it over the tensors of a graph. Its requests that are none have request row 0."""
        self._ends.clear()  # of other graphs
        rows = of_graph()
        self._captured[graph] = self._end(rows._replace(request_rows=rows.request_rows * self._commits))
        self._rows[graph] = of_graph

    def capture_ends(self, recorder: Recorder | None) -> None:
        """Capture all of it behind each graph, too, for masks, penalties and both; None: it runs as written.

        Raises ConfigError where it cannot be captured.
        """
        if recorder is None or not self._rows:
            return
        graphs = {graph[1]: graph for graph in self._rows}
        vocabulary = self._rows[graphs[max(graphs)]]().logits.shape[1]
        size = self.mask_bytes(max(graphs), vocabulary) // torch.int32.itemsize
        masks = torch.zeros(size, dtype=torch.int32, device=self._text.device)
        self._masks = masks.view(-1, -(-vocabulary // 32))

        def end(masked: bool, penalised: bool, size: int) -> Outcome:
            masks = (self._masks, mask_places(self._masks, size)) if masked else None
            return self._end(self._rows[graphs[size]](), masks, penalised)

        for kind in ((True, False), (False, True), (True, True)):
            self._ends[kind] = CapturedPass("a round's end", partial(end, *kind), sorted(graphs), recorder)

    def _end(self, rows: Verified, masks: Masks | None = None, penalised: bool = False) -> Outcome:
        if masks is not None:
            bits, place = masks
            masks = bits, place.clamp(min=0)
            rows = rows._replace(input_ids=rows.input_ids.masked_fill(place < 0, NO_TOKEN))
        needs, raw = {*self._needs()}, None
        if penalised:  # in place, so that the signals of what the target says are read before
            needs, raw = needs | {"entropy"}, routing_stats(rows.logits)[0]
            self.penalise(rows, rows.logits, table=self.penalties.few)
        rows = rows._replace(predictions=self.sample(rows, masks))
        committed = self._accept(rows, self._stops.few, self._widest)
        # Requests without rows are counted as having them behind the last one.
        committed = committed._replace(last_rows=committed.last_rows.clamp(max=len(rows.logits) - 1))
        self.park(rows, committed)
        if raw is not None:
            rows = rows._replace(signals={"entropy": raw[committed.last_rows]})
        return committed, self.signals(rows, committed, needs)

    def let_graphs_commit(self, unchanged: bool, row_ids: Sequence[int]) -> None:
        """Whether the graph that is replayed next, if any, may commit.

        Args:
            unchanged: tokens are sampled from the logits as they are. row_ids: request rows; one with more stops or
                penalties than graphs read keeps the batch from them.
        """
        self._few = not (self._stops.exceed_few(row_ids) or self.penalties.exceed_few(row_ids))
        may = unchanged and self._few
        if may != self._committing and self._captured:
            self._commits.fill_(may)
            self._committing = may

    def finish(
        self, rows: Verified, requests: int, masks: torch.Tensor | None, penalised: bool = False
    ) -> Verified:
        """With what the graph that was just replayed committed of its first so many requests, and `signals`, or what an
        end behind it does under masks or penalties. As it is if neither may. Good until the next replay.

        Args:
            masks: `packed` of `Masks`, if any.
        """
        if rows.graph not in self._rows or not self._few:
            return rows
        end = self._ends.get((masks is not None, penalised))
        if self._committing:
            committed, signals = self._captured[rows.graph]
        elif end is None:
            return rows
        else:
            if masks is not None:
                self._masks[: len(masks)].copy_(masks, non_blocking=True)
            committed, signals = end.replay(rows.graph[1])
        committed = Committed(*(field[:requests] for field in committed))
        signals = {name: signal[:requests] for name, signal in signals.items()}
        return rows._replace(committed=committed, signals=signals)

    def penalise(
        self, rows: Verified, logits: torch.Tensor, first: int = 0, table: PenaltyTable | None = None
    ) -> None:
        """Change `logits`, [T, V] of packed rows from `first` on, in place as their requests ask."""
        packed = rows.input_ids, rows.indptr, rows.starts, rows.request_rows
        penalise_rows(logits, *packed, self._text, table or self.penalties.data, first=first)

    def sample(self, rows: Verified, masks: Masks | None = None, first: int = 0) -> torch.Tensor:
        """[T] int64, a token for each row of `rows.logits`. masks, first: as of `sample_rows`."""
        request = rows.indptr, rows.starts, rows.request_rows
        return sample_rows(rows.logits, *request, self._sampling, masks=masks, first=first)

    def commit(self, rows: Verified, stride: int) -> Committed:
        """Accept drafts, and write what is committed to the text.

        Args:
            stride: most rows of a request. A graph's has the columns of the widest block whatever it is.
        """
        if rows.committed is not None:
            return rows.committed
        return self._accept(rows, self._stops.data, stride)

    def park(self, rows: Verified, committed: Committed) -> None:
        """Keep the features of what was committed, for whoever drafts next."""
        if rows.committed is None:
            assert rows.predictions is not None
            self._rings.park(
                rows.features,
                rows.predictions,
                rows.request_rows,
                rows.starts,
                committed.accept_lens,
                rows.indptr[:-1],
                widest=committed.tokens.shape[1],
            )

    def signals(self, rows: Verified, committed: Committed, needs: Collection[str]) -> Signals:
        """The signals that a policy `needs`, at the last committed row of each request.

        `entropy` [B] of the target's distribution; `outputs` [B, K] of the router.
        """
        last, signals = committed.last_rows, {}
        if "entropy" in needs:
            known = rows.signals.get("entropy")
            signals["entropy"] = routing_stats(rows.logits, last)[0] if known is None else known
        if "delta" in needs:
            if self._router is None or rows.final_hidden is None:
                raise AssertionError("no policy needs a router that was not loaded")
            known = rows.signals.get("outputs")
            signals["outputs"] = (
                router_mlp(rows.final_hidden[last], *self._router) if known is None else known
            )
        return signals

    def _accept(self, rows: Verified, stops: torch.Tensor, stride: int) -> Committed:
        assert rows.predictions is not None
        return accept_and_commit(
            rows.predictions,
            rows.input_ids,
            rows.indptr,
            rows.starts,
            stride=stride,
            request_slots=rows.request_rows,
            stops=stops,
            text=self._text,
        )
