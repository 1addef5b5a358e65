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
    """

    def __init__(self, weight: Tensor, ids: Tensor | None) -> None:
        self.weight, self.ids = weight, ids

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] → [..., K]."""
        return F.linear(hidden, self.weight)

    def target_ids(self, rows: Tensor) -> Tensor:
        """Rows of the head → the target's ids, any shape."""
        return rows if self.ids is None else self.ids[rows]

    def within(self, vocabulary: Tensor) -> "DraftHead":
        """The same head over the ids `vocabulary` [K'] int64 only.

        Raises:
            ValueError: an id that this head does not draft.
        """
        if self.ids is None:
            return DraftHead(self.weight[vocabulary], vocabulary)
        kept = torch.isin(self.ids, vocabulary)
        if int(kept.sum()) != len(vocabulary):
            raise ValueError("the vocabulary has tokens that this drafter's own head does not draft")
        return DraftHead(self.weight[kept], self.ids[kept])
