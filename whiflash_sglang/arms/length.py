"""Cuts drafts where one more token is not expected to pay for its row.

A drafter's confidence in a token (its own top-1 probability) is calibrated while serving into the chance that the
target accepts it, given that it accepted everything before. The product of these chances along a draft is the gain
expected of one more token; `Worth` is its cost. Imports no SGLang.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from whiflash_kernels import cut_drafts

from whiflash_sglang.drafts.rates import Rates
from whiflash_sglang.prices.costs import FULL_LENGTH, Worth
from whiflash_sglang.records.core import DraftBatch

EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Top-1 probabilities that separate the bins of confidence."""

CALIBRATION = len(EDGES) + 3
"""Length of a calibration: the chance of each bin, their mean, and a row's worth."""

PRIOR_WEIGHT = 8.0
"""Weight of the prior in tokens. The prior says that a drafter is right as often as it is confident."""

DECAY = 0.998
"""Factor on the weight of a bin's earlier observations at every new one."""


def chances() -> Rates:
    """Make the table of acceptance chances per bin of confidence; the prior is the middle of the bin."""
    return Rates(((low + high) / 2 for low, high in pairwise((0.0, *EDGES, 1.0))), PRIOR_WEIGHT, DECAY)


class DraftLength:
    """The acceptance chances of one drafter, learned on the host; the device cuts a round's drafts by them."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.chances = chances()
        self._edges = torch.tensor(EDGES, device=device)

    def calibration(self, worth: Worth = FULL_LENGTH) -> list[float]:
        """Return the `CALIBRATION` numbers that a round's plan uploads: the chance of every bin, their mean, and the
        worth of a row.
        """
        return [*self.chances.all, self.chances.mean, worth.row]

    def cut(self, confidences: torch.Tensor, batch: DraftBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many drafts with `confidences` [B, W] float32 are worth their rows: counts [B] int64, and chances
        [B, W] that each draft and all before it are right.

        The count is at least 1, so that a drafter that was wrong for a while can recover.
        """
        return cut_drafts(confidences, batch.calibration, self._edges, batch.caps)

    def observe(self, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        """Learn from a round: the first `accepted` of `proposed` drafts with these `confidences` were right."""
        for depth, confidence in enumerate(confidences[: min(accepted + 1, proposed)]):
            self.chances.observe(bisect_right(EDGES, confidence), depth < accepted)
