"""The copying arm: no training, no forward pass, no KV (prompt lookup; SuffixDecoding, arXiv 2411.04975).

While it drafts, both neural drafters do nothing at all; what they missed waits in the rings and is ingested in one
batch when one of them is chosen again.
"""

import torch

from whiflash_sglang import arms
from whiflash_sglang.drafters.base import DraftBatch, Drafter, Drafts, History
from whiflash_sglang.lookup.calibration import MatchCalibration
from whiflash_sglang.lookup.index import NO_MATCH, Match, SuffixIndex

WORTH = 0.25
"""Chance of being accepted below which one more copied token is not worth verifying, where costs are not priced."""


class LookupArm(Drafter):
    """Proposes what followed the longest earlier occurrence of the text's end.

    Args:
        max_width: drafts of a round at most. min_match: shortest match worth copying from.
    """

    arm = arms.LOOKUP

    def __init__(self, max_width: int, min_match: int) -> None:
        self.max_drafts = max_width
        self.calibration = MatchCalibration()
        self._min_match = min_match
        self._indexes: dict[int, SuffixIndex] = {}
        self._matches: dict[int, Match] = {}
        self._worth = WORTH

    def outlook(self, row: int, length: int, history: History) -> float:
        index = self._indexes.get(row)
        if index is None:
            index = self._indexes[row] = SuffixIndex()
        index.extend(history(len(index)))
        match = index.match()
        if match.length < self._min_match:
            self._matches[row] = NO_MATCH
            return 1.0
        self._matches[row] = match
        return 1.0 + self.calibration.expected(match.length, self._width(match, self.max_drafts))

    def draft(self, batch: DraftBatch) -> Drafts:
        self._worth = batch.worth.row or WORTH
        proposals: list[list[int]] = []
        for row, limit in zip(batch.row_ids, batch.limits, strict=True):
            match = self._matches.get(row, NO_MATCH)
            width = self._width(match, limit) if match.length else 0
            proposals.append(list(self._indexes[row].continuation(match.source, width)) if width else [])
        counts = [len(p) for p in proposals]
        tokens = torch.zeros((len(batch), max(counts)), dtype=torch.int64)
        for i, proposal in enumerate(proposals):
            tokens[i, : len(proposal)] = torch.tensor(proposal, dtype=torch.int64)
        return Drafts(tokens.to(batch.bonus.device), counts)

    def observe(self, row: int, proposed: int, accepted: int) -> None:
        match = self._matches.get(row, NO_MATCH)
        if match.length and proposed:
            self.calibration.observe(match.length, proposed, accepted)

    def release(self, row: int) -> None:
        self._indexes.pop(row, None)
        self._matches.pop(row, None)

    def _width(self, match: Match, limit: int) -> int:
        return self.calibration.width(match.length, limit, self._worth)
