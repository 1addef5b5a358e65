"""The device's work after the target's forward: sampling, accepting, parking, and the signals of policies.

Imports no SGLang.

It is a function of a verification's packed rows. If the host has a part in what is sampled from (grammars, penalties,
log-probabilities), it runs as it is written when that is known. Else it is captured as the end of every verification's
graph. Its results hold until the next replay: packing the round's download copies them.

A graph cannot leave its end out. If it must not commit, it does so for request row 0, which is nobody's and for which
nothing is sampled: in it the rows are multiplied by a number on the device, which is 0 then.
"""

from collections.abc import Callable, Collection, Hashable, Sequence

import torch
from whiflash_kernels import (
    Committed,
    SamplingTable,
    accept_and_commit,
    router_mlp,
    routing_stats,
    sample_rows,
)

from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.cache.tokens import StopTable
from whiflash_sglang.formats.router import Layers
from whiflash_sglang.records.core import Verified

GATE_BYTES = torch.int64.itemsize
"""Bytes of the scalar that lets graphs commit; every epilogue has one."""


Signals = dict[str, torch.Tensor]
Masks = tuple[torch.Tensor, torch.Tensor]


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
        router: Layers | None,
        widest: int,
        needs: Callable[[], Collection[str]],
    ) -> None:
        self._rings, self._text, self._stops, self._router = rings, text, stops, router
        self._sampling = sampling
        self._widest, self._needs = widest, needs
        self._commits = torch.zeros((), dtype=torch.int64, device=text.device)
        self._committing = False  # what the device was last sent
        self._captured: dict[Hashable, tuple[Committed, Signals]] = {}

    @staticmethod
    def bytes_for(widest: int) -> int:
        """Bytes that a graph keeps of one request, of which there are no more than rows."""
        committed = (widest + 3) * torch.int64.itemsize + torch.int32.itemsize
        return committed + (1 + 3) * torch.float32.itemsize  # entropy, and a router's outputs

    def capture(self, graph: Hashable, rows: Verified) -> None:
        """Issue all of it over the tensors of a graph. Its requests that are none have request row 0."""
        rows = rows._replace(request_rows=rows.request_rows * self._commits)
        rows = rows._replace(predictions=self.sample(rows))
        committed = self._accept(rows, self._stops.few, self._widest)
        # Requests without rows are counted as having them behind the last one.
        committed = committed._replace(last_rows=committed.last_rows.clamp(max=len(rows.logits) - 1))
        self.park(rows, committed)
        self._captured[graph] = committed, self.signals(rows, committed, self._needs())

    def let_graphs_commit(self, unchanged: bool, row_ids: Sequence[int]) -> None:
        """Whether the graph that is replayed next, if any, may commit.

        Args:
            unchanged: tokens are sampled from the logits as they are. row_ids: request rows; one whose stops are more
                than a graph reads keeps the batch from it.
        """
        may = unchanged and not self._stops.exceed_few(row_ids)
        if may != self._committing and self._captured:
            self._commits.fill_(may)
            self._committing = may

    def outcome(self, graph: Hashable, requests: int) -> tuple[Committed, Signals] | None:
        """Tokens that a graph just replayed committed for its first so many requests, and its `signals`; None if it
        might not commit. They are good until the next replay.
        """
        if not self._committing or graph not in self._captured:
            return None
        committed, signals = self._captured[graph]
        first = Committed(*(field[:requests] for field in committed))
        return first, {name: signal[:requests] for name, signal in signals.items()}

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
