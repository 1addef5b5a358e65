"""The device's work after the target's forward: sample, accept drafts, park features, compute the policy's signals.

Imports no SGLang.

All of it is one function of a verification's packed rows. It is captured as the end of every verification's graph, and
once more in graphs of its own ("ends"), which are replayed when the masks are made, for rows that are masked, penalised
or rated (log-probabilities). If SGLang's sampler draws, it runs eagerly. A graph's results hold until its next replay;
packing the round's download copies them before that.

A graph cannot skip its own end. If it must not commit, it commits to request row 0, which no request has: it multiplies
the request rows by a number on the device, which is 0 then.
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
"""Bytes of the scalar, one per epilogue, that is 1 if graphs may commit and 0 if not."""
FEW_RATED, FEW_BESIDE = 4, 20
"""Most requests that a captured end rates; most likeliest and most named tokens of each position."""
RATED_ROWS, RATED_BYTES = 128, 10
"""Largest number of rows that are rated at once; bytes that each of their logits takes at the peak."""


Signals = dict[str, torch.Tensor]
Masks = tuple[torch.Tensor, torch.Tensor]
Graph = tuple[int, int, bool]
"""Key of a verification's graph: number of its runner, packed rows, whether each request has one row."""
Outcome = tuple[Committed, Signals]
Kind = tuple[bool, bool, bool]
"""Kind of a captured end: whether it masks, whether it penalises, whether it rates. All that rate also penalise."""


class Epilogue:
    """Samples, accepts and parks verified rows, in a verification's graph or after it.

    Args:
        rings: where features are parked. text: `TokenTable.data`. sampling: `SamplingRows.data`. router: the bundle's
            router, None if no policy may need one. widest: most rows of a request. needs: returns the signals that the
            policy reads now; a graph computes those that were read when it was captured, and further ones are computed
            after its replay. scales: whether logits are divided by the temperature before log-probabilities.
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
        self._committing = False  # the value of `_commits` on the device
        self._few = False  # whether no request has more stops or penalties than graphs read
        self._captured: dict[Graph, Outcome] = {}
        self._rows: dict[Graph, Callable[[], Verified]] = {}
        self._ends: dict[tuple[bool, Kind], CapturedPass[Outcome]] = {}

    @staticmethod
    def bytes_for(widest: int) -> int:
        """Return the bytes of results per request of a graph and its ends; a graph has no more requests than rows."""
        committed = (widest + 3) * torch.int64.itemsize + torch.int32.itemsize
        return 6 * (committed + (1 + 3) * torch.float32.itemsize)  # an entropy and a router's three outputs

    @staticmethod
    def mask_bytes(rows: int, vocabulary: int) -> int:
        """Return the bytes of the grammar masks that captured ends of up to so many rows read."""
        words = -(-vocabulary // 32)
        return (masks_of_places(rows, words) + 1 + rows) * words * torch.int32.itemsize

    @staticmethod
    def rate_bytes(widest: int, vocabulary: int) -> int:
        """Return the bytes that captured ends need to rate FEW_RATED requests of up to `widest` rows each."""
        return FEW_RATED * widest * vocabulary * RATED_BYTES

    def capture(self, graph: Graph, of_graph: Callable[[], Verified]) -> None:
        """Capture a graph's sampling, acceptance and parking with it. Its padding requests have request row 0."""
        self._ends.clear()  # they were captured for other graphs
        rows = of_graph()
        rows = rows._replace(request_rows=rows.request_rows * self._commits)
        self._captured[graph] = self._end(rows, self._most(graph))
        self._rows[graph] = of_graph

    def capture_ends(self, recorder: Recorder | None) -> None:
        """Capture an end of every kind for each verification graph; without a recorder, ends run eagerly.

        Raises ConfigError if one cannot be captured.
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
        self._asking: Sequence[Asked] = ()  # the requests whose ids `_rated.asked` has

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
        """Return the most rows that one request has in a graph."""
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
        if most > 1:  # padding requests have no rows, so their last row would be after the end
            committed = committed._replace(last_rows=committed.last_rows.clamp(max=len(rows.logits) - 1))
        self.park(rows, committed)
        return committed, self.signals(rows, committed, needs)

    def let_graphs_commit(self, unchanged: bool, row_ids: Sequence[int]) -> None:
        """Set on the device whether the graph that is replayed next may commit.

        Args:
            unchanged: whether tokens are sampled from unmasked, unpenalised logits. row_ids: request rows; if one has
                more stops or penalties than graphs read, the batch is committed eagerly.
        """
        self._few = not (self._stops.exceed_few(row_ids) or self.penalties.exceed_few(row_ids))
        may = unchanged and self._few
        if may != self._committing and self._captured:
            self._commits.fill_(may)
            self._committing = may

    def finish(
        self, rows: Verified, requests: int, masks: torch.Tensor | None, penalised: bool = False
    ) -> Verified:
        """Add to `rows` what the graph that was just replayed committed for its first `requests` requests. If rows are
        masked, penalised or rated, replay the captured end of that kind and add its results. Return `rows` unchanged if
        no graph may commit. Results hold until the next replay.

        Args:
            masks: `Masks.packed`, or None.
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
        """Send the device the ids and counts that requests ask for, into the tensors of captured ends if they fit."""
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
        """Penalise `logits` in place as requests ask. Return rows with the `entropy` of the unpenalised logits, [T]."""
        raw, packed = routing_stats(rows.logits)[0], (rows.input_ids, rows.indptr, rows.starts)
        penalise_rows(rows.logits, *packed, rows.request_rows, self._text, table or self.penalties.data)
        return rows._replace(entropy=raw)

    def sample(self, rows: Verified, masks: Masks | None = None) -> torch.Tensor:
        """Draw a token for each row of `rows.logits`, [T] int64. masks: bits, and the place of each row's mask."""
        request = rows.indptr, rows.starts, rows.request_rows
        return sample_rows(rows.logits, *request, self._sampling, masks=masks)

    def commit(self, rows: Verified, stride: int) -> Committed:
        """Accept drafts and write the committed tokens to the text, unless a graph has done so.

        Args:
            stride: most rows of a request, the columns of `Committed.tokens`. A graph's result has its own number.
        """
        if rows.committed is not None:
            return rows.committed
        return self._accept(rows, self._stops.data, stride)

    def park(self, rows: Verified, committed: Committed) -> None:
        """Park the features of the committed tokens in the rings, unless a graph has done so."""
        if rows.committed is None:
            assert rows.predictions is not None
            packed = rows.features, rows.predictions, rows.request_rows, rows.starts
            begins, widest = rows.indptr[:-1], committed.tokens.shape[1]
            self._rings.park(*packed, committed.accept_lens, begins, widest=widest)

    def signals(self, rows: Verified, committed: Committed, needs: Collection[str]) -> Signals:
        """Return the signals that a policy `needs`, at the last committed row of each request, and log-probabilities.

        `entropy` [B] of the target's distribution; `outputs` [B, K] of the router. `rates` [A, W, 1 + I + 2K] float32,
        if requests asked: for A requests and W committed tokens, log-probabilities of the token, of I ids that the
        request names, of the K likeliest tokens; then the ids of these K, as int32 bits.
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
        """Return `rates` of the requests in `asked` [A, 1 + I], computed as SGLang's speculative workers do."""
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
