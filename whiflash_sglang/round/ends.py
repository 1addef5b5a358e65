"""Commit verified rows in graphs, without the host. Imports no SGLang.

Every verification's graph ends with the functions of `Epilogue` and `SignalReader`. They are captured once more in
second graphs, which are replayed when the masks are made, for rows that are masked, penalised or rated
(log-probabilities). A graph's results hold until its next replay; packing the round's download copies them before that.

A graph cannot skip its own end. If it must not commit, it commits to request row 0, which no request has: it multiplies
the request rows by a number on the device, which is 0 then.
"""

from collections.abc import Callable, Collection
from functools import partial
from itertools import product

import numpy as np
import torch
from whiflash_kernels import Committed

from whiflash_sglang.device.capture import CapturedPass, Recorder
from whiflash_sglang.device.transfers import mask_places, masks_of_places, sent
from whiflash_sglang.records.core import Rated, RatesAsked, Verified
from whiflash_sglang.round.epilogue import Epilogue, under_masks
from whiflash_sglang.round.signals import RATED_BYTES, SignalReader

FEW_RATED, FEW_BESIDE = 4, 20
"""Most requests that a second graph rates; most likeliest and most named tokens of each position."""

Graph = tuple[int, int, bool]
"""Key of a verification's graph: number of its runner, packed rows, whether each request has one row."""
Outcome = tuple[Committed, dict[str, torch.Tensor]]
Kind = tuple[bool, bool, bool]
"""Kind of a second graph: whether it masks, whether it penalises, whether it rates. All that rate also penalise."""


class GraphEnds:
    """Captures the commits at the end of the target's graphs, and second graphs that only commit; replays these.

    Args:
        widest: most rows of a request. needs: returns the signals that the policy reads now. A graph computes those
            that it returned at the capture; others are computed after the graph.
    """

    def __init__(
        self, epilogue: Epilogue, signals: SignalReader, widest: int, needs: Callable[[], Collection[str]]
    ) -> None:
        self._epilogue, self._signals, self._widest, self._needs = epilogue, signals, widest, needs
        self._device = epilogue.penalties.few.places.device
        self._commits = torch.zeros((), dtype=torch.int64, device=self._device)
        self._committing = False  # the value of `_commits` on the device
        self._graphs: dict[Graph, tuple[Callable[[], Verified], Outcome]] = {}
        self._seconds: dict[tuple[bool, Kind], CapturedPass[Outcome]] = {}

    @staticmethod
    def bytes_for(widest: int) -> int:
        """Return the bytes of results that a graph and its second graphs keep per request; no row needs more."""
        committed = (widest + 3) * torch.int64.itemsize + torch.int32.itemsize
        return 6 * (committed + (1 + 3) * torch.float32.itemsize)  # an entropy and a router's three outputs

    @staticmethod
    def second_bytes(rows: int, widest: int, vocabulary: int) -> int:
        """Return the bytes that second graphs of up to `rows` rows need: masks of all rows, and log-probabilities of
        FEW_RATED requests with up to `widest` rows each.
        """
        masks, words = _masks_of(rows, vocabulary)
        return masks * words * torch.int32.itemsize + FEW_RATED * widest * vocabulary * RATED_BYTES

    def capture(self, graph: Graph, of_graph: Callable[[], Verified]) -> None:
        """Capture sampling, acceptance and parking at the end of a graph. Its padding requests have request row 0."""
        self._seconds.clear()  # they were captured for other graphs
        rows = of_graph()
        rows = rows._replace(request_rows=rows.request_rows * self._commits)
        self._graphs[graph] = of_graph, self._end(rows, graph, self._needs())

    def capture_seconds(self, recorder: Recorder | None) -> None:
        """Capture a second graph of every kind for each verification graph; without a recorder there are none.

        Raises ConfigError if one cannot be captured.
        """
        if recorder is None or not self._graphs:
            return
        graphs = {graph[1:]: graph for graph in self._graphs}
        largest = max(graphs)
        vocabulary = self._graphs[graphs[largest]][0]().logits.shape[1]
        self._masks = torch.zeros(_masks_of(largest[0], vocabulary), dtype=torch.int32, device=self._device)
        ids = torch.zeros((FEW_RATED, 1 + FEW_BESIDE), dtype=torch.int64, device=self._device)
        self._rated = Rated({}, ids, min(FEW_BESIDE, vocabulary), captured=True)

        def second(plain: bool, kind: Kind, size: int) -> Outcome:
            (masked, penalised, rated), graph = kind, graphs[size, plain]
            rows, needs = self._graphs[graph][0](), {*self._needs()}
            if masked:
                rows = under_masks(rows, self._masks, mask_places(self._masks, size))
            if penalised:
                # Behind this graph nobody could read the entropy of the unpenalised logits.
                rows, needs = self._epilogue.penalise(rows, few=True), {*needs, "entropy"}
            return self._end(rows._replace(rated=self._rated if rated else None), graph, needs)

        kinds = (True, False, False), *product((False, True), (True,), (False, True))
        for plain, kind in product({plain for _, plain in graphs}, kinds):
            sizes = sorted(rows for rows, of_plain in graphs if of_plain == plain)
            body = partial(second, plain, kind)
            self._seconds[plain, kind] = CapturedPass("a round's end", body, sizes, recorder)

    def _end(self, rows: Verified, graph: Graph, needs: Collection[str]) -> Outcome:
        most = 1 if graph[2] else self._widest
        rows = rows._replace(predictions=self._epilogue.sample(rows))
        committed = self._epilogue.commit(rows, most)
        if most > 1:  # padding requests have no rows, so their last row would be after the end
            committed = committed._replace(last_rows=committed.last_rows.clamp(max=len(rows.logits) - 1))
        self._epilogue.park(rows, committed)
        return committed, self._signals.read(rows, committed, needs)

    def rated(self, requests: RatesAsked) -> Rated:
        """Upload the token ids and counts of requests for log-probabilities, for second graphs if they fit there."""
        most, names = (max(column) for column in zip(*((n, len(ids)) for n, ids in requests.values()), strict=True))
        few = bool(self._seconds) and len(requests) <= FEW_RATED and max(most, names) <= FEW_BESIDE
        if few and requests == self._rated.requests:
            return self._rated
        columns = FEW_BESIDE if few else names
        numbers = [(i, *ids, *[0] * (columns - len(ids))) for i, (_, ids) in requests.items()]
        ids = sent(np.array(numbers).ravel(), self._device).view(len(requests), -1)
        if not few:
            return Rated(requests, ids, most)
        self._rated.ids[: len(requests)].copy_(ids)
        self._rated = self._rated._replace(requests=requests)
        return self._rated

    def let_commit(self, may: bool) -> None:
        """Write to the device whether the next replay of a verification graph also commits its rows."""
        if may != self._committing and self._graphs:
            self._commits.fill_(may)
            self._committing = may

    def has(self, graph: Graph | None, kind: Kind) -> bool:
        """Whether rows of `graph` can be committed without the host. graph: None if their forward was eager."""
        return graph in self._graphs and (not any(kind) or (graph[2], kind) in self._seconds)

    def in_graph(self, rows: Verified, requests: int) -> Verified:
        """Return `rows` with what their graph has committed for its first `requests` requests."""
        assert rows.graph is not None
        return _committed(rows, requests, self._graphs[rows.graph][1])

    def in_second_graph(self, rows: Verified, requests: int, kind: Kind, masks: torch.Tensor | None) -> Verified:
        """Commit `rows` in a second graph of `kind`. masks: `Masks.packed`; None: that kind does not mask."""
        assert rows.graph is not None
        _, size, plain = rows.graph
        if masks is not None:
            self._masks[: len(masks)].copy_(masks, non_blocking=True)
            if rows.rated is not None and not rows.rated.captured:
                # Log-probabilities are computed behind the graph, under the same masks.
                rows = under_masks(rows, self._masks, mask_places(self._masks, size))
        return _committed(rows, requests, self._seconds[plain, kind].replay(size))


def _committed(rows: Verified, requests: int, outcome: Outcome) -> Verified:
    committed, signals = outcome
    committed = Committed(*(field[:requests] for field in committed))
    return rows._replace(committed=committed, signals={name: signal[:requests] for name, signal in signals.items()})


def _masks_of(rows: int, vocabulary: int) -> tuple[int, int]:
    """Return the largest shape of `Masks.packed` for `rows` rows: masks, `mask_places` included, and words of each."""
    words = -(-vocabulary // 32)
    return masks_of_places(rows, words) + 1 + rows, words
