"""What a drafter proposes, and how sure it is."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Choice(NamedTuple):
    """Of each row of logits: token [N] int64, the first of the largest; confidence [N] fp32, its probability."""

    token: Tensor
    confidence: Tensor


def choose(logits: Tensor) -> Choice:
    """The drafter's first choice for every row of `logits` [N, V], any float type."""
    top = logits.max(-1)
    return Choice(top.indices, (top.values.float() - logits.float().logsumexp(-1)).exp())


class DraftHead:
    """Logits over what a drafter chooses from.

    Args:
        weight: [K, H]. ids: [K] int64, the target's id of each row; None: the rows are the target's vocabulary.
        beside: [K, R], a second matrix over the same rows, of drafters whose tokens depend on one another.
    """

    def __init__(self, weight: Tensor, ids: Tensor | None, beside: Tensor | None = None) -> None:
        self.weight, self.ids, self._beside = weight, ids, beside

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] → [..., K]."""
        return F.linear(hidden, self.weight)

    def second(self, latent: Tensor) -> Tensor:
        """[..., R] → [..., K], by the second matrix. Raises ValueError where there is none."""
        if self._beside is None:
            raise ValueError("this head has no second matrix")
        return F.linear(latent, self._beside)

    def beside(self, matrix: Tensor | None) -> "DraftHead":
        """The same head with `matrix` [K, R] as its second."""
        return DraftHead(self.weight, self.ids, matrix)

    def target_ids(self, rows: Tensor) -> Tensor:
        """Rows of the head → the target's ids, any shape."""
        return rows if self.ids is None else self.ids[rows]

    def within(self, vocabulary: Tensor) -> "DraftHead":
        """The same head over the ids `vocabulary` [K'] int64 only.

        Raises:
            ValueError: an id that this head does not draft.
        """
        rows = vocabulary
        if self.ids is not None:
            rows = torch.isin(self.ids, vocabulary).nonzero()[:, 0]
            if len(rows) != len(vocabulary):
                raise ValueError("the vocabulary has tokens that this drafter's own head does not draft")
            vocabulary = self.ids[rows]
        return DraftHead(self.weight[rows], vocabulary, None if self._beside is None else self._beside[rows])
