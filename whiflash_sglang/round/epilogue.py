"""The device's work after the target's forward: sampling, accepting, parking, and the signals of policies.

Imports no SGLang.

It is a function of a verification's packed rows, captured as the end of every verification's graph, and once more in a
graph of its own for what is sampled under masks or penalties, or rated (log-probabilities), which is replayed when the
masks are made. If SGLang's sampler draws, it runs as it is written. Results of a graph hold until the next replay:
packing the round's download copies them.

A graph cannot leave its end out. If it must not commit, it does so for request row 0, which is nobody's and for which
nothing is sampled: in it the rows are multiplied by a number on the device, which is 0 then.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import product

import numpy as np
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
from whiflash_sglang.device.transfers import mask_places, masks_of_places, sent
from whiflash_sglang.formats.router import Layers
from whiflash_sglang.records.core import Asked, Rated, Verified

GATE_BYTES = torch.int64.itemsize
"""Bytes of the scalar that lets graphs commit; every epilogue has one."""
FEW_RATED, FEW_BESIDE = 4, 20
"""Requests that the end of a graph rates, and how many likeliest and how many named tokens of each position."""
RATED_ROWS, RATED_BYTES = 128, 10
"""Rows that are rated at once, and bytes of each logit of theirs at the peak."""


Signals = dict[str, torch.Tensor]
Masks = tuple[torch.Tensor, torch.Tensor]
Graph = tuple[int, int, bool]
"""A verification's graph: its runner, rows, and whether each request has one."""
Outcome = tuple[Committed, Signals]
Kind = tuple[bool, bool, bool]
"""Whether an end behind a graph is masked, whether it penalises, and whether it rates; one that rates does both."""


class Epilogue:
    """Commits verified rows.

    Args:
        rings: where features are parked. text: `TokenTable.data`. sampling: `SamplingRows.data`. router: of the bundle,
            None where no policy may need one. widest: most rows of a request. needs: what the policy reads now; a
            graph computes what it was when it was captured, and what a later policy needs beside it is computed
            behind the graph. scales: whether log-probabilities are those of logits by temperature.
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
        scales: Callable[[], bool],
    ) -> None:
        self._rings, self._text, self._stops, self._router = rings, text, stops, router
        self._sampling, self.penalties = sampling, penalties
        self._widest, self._needs, self._scales = widest, needs, scales
        self._commits = torch.zeros((), dtype=torch.int64, device=text.device)
        self._committing = False  # what the device was last sent
        self._few = False  # whether the batch has no more stops, and penalties, than graphs read
        self._captured: dict[Graph, Outcome] = {}
        self._rows: dict[Graph, Callable[[], Verified]] = {}
        self._ends: dict[tuple[bool, Kind], CapturedPass[Outcome]] = {}

    @staticmethod
    def bytes_for(widest: int) -> int:
        """Bytes that a graph and the ends behind it keep of one request, of which there are no more than rows."""
        committed = (widest + 3) * torch.int64.itemsize + torch.int32.itemsize
        return 6 * (committed + (1 + 3) * torch.float32.itemsize)  # entropy, and a router's outputs

    @staticmethod
    def mask_bytes(rows: int, vocabulary: int) -> int:
        """Bytes of the masks that ends of graphs of up to so many rows read."""
        words = -(-vocabulary // 32)
        return (masks_of_places(rows, words) + 1 + rows) * words * torch.int32.itemsize

    @staticmethod
    def rate_bytes(widest: int, vocabulary: int) -> int:
        """Bytes that ends of graphs rate requests of up to so many rows in."""
        return FEW_RATED * widest * vocabulary * RATED_BYTES

    def capture(self, graph: Graph, of_graph: Callable[[], Verified]) -> None:
        """Issue all of it over the tensors of a graph. Its requests that are none have request row 0."""
        self._ends.clear()  # of other graphs
        rows = of_graph()
        rows = rows._replace(request_rows=rows.request_rows * self._commits)
        self._captured[graph] = self._end(rows, self._most(graph))
        self._rows[graph] = of_graph

    def capture_ends(self, recorder: Recorder | None) -> None:
        """Capture all of it behind each graph, too, for every kind of end; None: it runs as written.

        Raises ConfigError where it cannot be captured.
        """
        if recorder is None or not self._rows:
            return
        graphs = {graph[1:]: graph for graph in self._rows}
        largest = max(graphs)
        vocabulary = self._rows[graphs[largest]]().logits.shape[1]
        size = self.mask_bytes(largest[0], vocabulary) // torch.int32.itemsize
        masks = torch.zeros(size, dtype=torch.int32, device=self._text.device)
        self._masks = masks.view(-1, -(-vocabulary // 32))
        asked = torch.zeros((FEW_RATED, 1 + FEW_BESIDE), dtype=torch.int64, device=self._text.device)
        self._rated = Rated((), asked, min(FEW_BESIDE, vocabulary), captured=True)
        self._asking: Sequence[Asked] = ()  # what the device was last sent

        def end(plain: bool, kind: Kind, size: int) -> Outcome:
            masked, *others = kind
            masks = (self._masks, mask_places(self._masks, size)) if masked else None
            graph = graphs[size, plain]
            return self._end(self._rows[graph](), self._most(graph), masks, *others)

        kinds = (True, False, False), *product((False, True), (True,), (False, True))
        for plain, kind in product({plain for _, plain in graphs}, kinds):
            sizes = sorted(rows for rows, of_plain in graphs if of_plain == plain)
            name, body = "a round's end", partial(end, plain, kind)
            self._ends[plain, kind] = CapturedPass(name, body, sizes, recorder)

    def _most(self, graph: Graph) -> int:
        """Rows of a request in a graph, at most."""
        return 1 if graph[2] else self._widest

    def _end(
        self,
        rows: Verified,
        most: int,
        masks: Masks | None = None,
        penalised: bool = False,
        rated: bool = False,
    ) -> Outcome:
        if masks is not None:
            bits, place = masks
            masks = bits, place.clamp(min=0)
            rows = rows._replace(input_ids=rows.input_ids.masked_fill(place < 0, NO_TOKEN))
        needs = {*self._needs()}
        if penalised:
            needs |= {"entropy"}
            rows = self.penalise(rows, self.penalties.few)
        if rated:
            rows = rows._replace(rated=self._rated._replace(masks=masks))
        rows = rows._replace(predictions=self.sample(rows, masks))
        committed = self._accept(rows, self._stops.few, most)
        if most > 1:  # requests without rows are counted as having them behind the last one
            committed = committed._replace(last_rows=committed.last_rows.clamp(max=len(rows.logits) - 1))
        self.park(rows, committed)
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
        end behind it does under masks, or penalised or rated. As it is if neither may. Good until the next replay.

        Args:
            masks: `packed` of `Masks`, if any.
        """
        if rows.graph not in self._rows or not self._few:
            return rows
        rated = rows.rated is not None and rows.rated.captured
        end = self._ends.get((rows.graph[2], (masks is not None, penalised or rated, rated)))
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

    def rated(self, asked: Sequence[Asked]) -> Rated:
        """Send the device what requests of a batch ask for; a place that graphs read, where there is room for it."""
        most, names = max(each.likeliest for each in asked), max(len(each.ids) for each in asked)
        few = bool(self._ends) and len(asked) <= FEW_RATED and max(most, names) <= FEW_BESIDE
        if not (few and asked == self._asking):
            columns = FEW_BESIDE if few else names
            numbers = [(each.request, *each.ids, *[0] * (columns - len(each.ids))) for each in asked]
            ids = sent(np.array(numbers).ravel(), self._text.device).view(len(asked), -1)
            if not few:
                return Rated(asked, ids, most, captured=False)
            self._rated.asked[: len(asked)].copy_(ids)
            self._asking = asked
        return self._rated._replace(requests=asked)

    def penalise(self, rows: Verified, table: PenaltyTable | None = None) -> Verified:
        """Change `logits` in place as requests ask. The result has the `entropy` of what the target says, too."""
        raw, packed = routing_stats(rows.logits)[0], (rows.input_ids, rows.indptr, rows.starts)
        penalise_rows(rows.logits, *packed, rows.request_rows, self._text, table or self.penalties.data)
        return rows._replace(entropy=raw)

    def sample(self, rows: Verified, masks: Masks | None = None) -> torch.Tensor:
        """[T] int64, a token for each row of `rows.logits`. masks: as of `sample_rows`."""
        request = rows.indptr, rows.starts, rows.request_rows
        return sample_rows(rows.logits, *request, self._sampling, masks=masks)

    def commit(self, rows: Verified, stride: int) -> Committed:
        """Accept drafts, and write what is committed to the text.

        Args:
            stride: most rows of a request. A graph's has the columns of its own widest block.
        """
        if rows.committed is not None:
            return rows.committed
        return self._accept(rows, self._stops.data, stride)

    def park(self, rows: Verified, committed: Committed) -> None:
        """Keep the features of what was committed, for whoever drafts next."""
        if rows.committed is None:
            assert rows.predictions is not None
            packed = rows.features, rows.predictions, rows.request_rows, rows.starts
            begins, widest = rows.indptr[:-1], committed.tokens.shape[1]
            self._rings.park(*packed, committed.accept_lens, begins, widest=widest)

    def signals(self, rows: Verified, committed: Committed, needs: Collection[str]) -> Signals:
        """The signals that a policy `needs`, at the last committed row of each request; and what is `rated`.

        `entropy` [B] of the target's distribution; `outputs` [B, K] of the router. `rates` [A, W, 1 + I + 2K] float32:
        log-probabilities of W committed tokens of A requests, of I tokens that each names, of the K likeliest at each;
        then the ids of these, as int32.
        """
        last, signals = committed.last_rows, {}
        if "entropy" in needs:
            known = rows.signals.get("entropy")
            if known is None:
                raw = rows.entropy
                known = routing_stats(rows.logits, last)[0] if raw is None else raw[last]
            signals["entropy"] = known
        if "delta" in needs:
            if self._router is None or rows.final_hidden is None:
                raise AssertionError("no policy needs a router that was not loaded")
            known = rows.signals.get("outputs")
            signals["outputs"] = (
                router_mlp(rows.final_hidden[last], *self._router) if known is None else known
            )
        if rows.rated is not None:
            known = rows.signals.get("rates")
            parts = torch.split(rows.rated.asked, max(RATED_ROWS // committed.tokens.shape[1], 1))
            signals["rates"] = (
                torch.cat([self._rate(rows, committed, asked) for asked in parts]) if known is None else known
            )
        return signals

    def _rate(self, rows: Verified, committed: Committed, asked: torch.Tensor) -> torch.Tensor:
        """`rates` of some requests, as upstream's speculative workers compute them."""
        assert rows.rated is not None
        request, tokens = asked[:, 0].clamp(max=len(committed.tokens) - 1), committed.tokens
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        packed = (rows.indptr[request][:, None] + columns).clamp_(max=len(rows.logits) - 1)
        x = rows.logits[packed].float()
        if (masks := rows.rated.masks) is not None:
            words = masks[0][masks[1][packed]]
            shifts = torch.arange(32, dtype=torch.int32, device=words.device)
            bits = (words[..., None] >> shifts).bitwise_and_(1)
            x.masked_fill_((bits == 0).flatten(2)[..., : x.shape[2]], -torch.inf)
        if self._scales():
            temperature, top_k = self._sampling.parameters[rows.request_rows[request], :2].unbind(1)
            x /= torch.where(top_k > 1, temperature, 1.0)[:, None, None]
        x = x.log_softmax(-1).clamp_(min=torch.finfo(x.dtype).min)
        likeliest = x.topk(rows.rated.likeliest)
        named = [tokens[request][..., None], asked[:, None, 1:].expand(-1, len(columns), -1)]
        ids = likeliest.indices.int().view(x.dtype)
        return torch.cat([x.gather(2, torch.cat(named, 2)), likeliest.values, ids], 2)

    def _accept(self, rows: Verified, stops: torch.Tensor, stride: int) -> Committed:
        assert rows.predictions is not None
        packed, request = (rows.predictions, rows.input_ids, rows.indptr, rows.starts), rows.request_rows
        return accept_and_commit(*packed, stride=stride, request_slots=request, stops=stops, text=self._text)
