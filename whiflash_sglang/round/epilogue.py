"""Sample verified rows, accept their drafts and park their features. Imports no SGLang.

These functions run at the end of a verification's graph or a second graph (`round/ends.py`), or eagerly behind it.
"""

import torch
from whiflash_kernels import Committed, SamplingTable, accept_and_commit, penalise_rows, routing_stats, sample_rows

from whiflash_sglang.cache.backlog import FeatureRings
from whiflash_sglang.cache.penalties import PenaltyRows
from whiflash_sglang.cache.tokens import NO_TOKEN, StopTable
from whiflash_sglang.records.core import Verified


def under_masks(rows: Verified, bits: torch.Tensor, places: torch.Tensor) -> Verified:
    """Return `rows` under masks `bits` [M, words] int32. places: [T] int64, each row's mask; -1 rejects its draft."""
    ids = rows.input_ids.masked_fill(places < 0, NO_TOKEN)
    return rows._replace(masks=(bits, places.clamp(min=0)), input_ids=ids)


class Epilogue:
    """Commits verified rows.

    Args:
        rings: where features are parked. text: `TokenTable.data`. sampling: `SamplingRows.data`.
    """

    def __init__(
        self, rings: FeatureRings, text: torch.Tensor, stops: StopTable, sampling: SamplingTable, penalties: PenaltyRows
    ) -> None:
        self._rings, self._text, self._stops = rings, text, stops.few
        self._sampling, self.penalties = sampling, penalties

    def penalise(self, rows: Verified, *, few: bool = False) -> Verified:
        """Penalise `logits` in place as requests ask. Return rows with the `entropy` of the unpenalised logits, [T]."""
        raw, packed = routing_stats(rows.logits)[0], (rows.input_ids, rows.indptr, rows.starts)
        table = self.penalties.few if few else self.penalties.data
        penalise_rows(rows.logits, *packed, rows.request_rows, self._text, table)
        return rows._replace(entropy=raw)

    def sample(self, rows: Verified) -> torch.Tensor:
        """Draw a token for each row of `rows.logits`, [T] int64."""
        request = rows.indptr, rows.starts, rows.request_rows
        return sample_rows(rows.logits, *request, self._sampling, masks=rows.masks)

    def commit(self, rows: Verified, stride: int) -> Committed:
        """Accept drafts and write the committed tokens to the text, unless a graph has done so.

        Args:
            stride: most rows of a request, the columns of `Committed.tokens`; a graph keeps its own.
        """
        if rows.committed is not None:
            return rows.committed
        assert rows.predictions is not None
        packed, request = (rows.predictions, rows.input_ids, rows.indptr, rows.starts), rows.request_rows
        return accept_and_commit(*packed, stride=stride, request_slots=request, stops=self._stops, text=self._text)

    def park(self, rows: Verified, committed: Committed) -> None:
        """Park the features of the committed tokens in the rings, unless a graph has done so."""
        if rows.committed is None:
            assert rows.predictions is not None
            packed = rows.features, rows.predictions, rows.request_rows, rows.starts
            begins, widest = rows.indptr[:-1], committed.tokens.shape[1]
            self._rings.park(*packed, committed.accept_lens, begins, widest=widest)
