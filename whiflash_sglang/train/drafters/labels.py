"""What a drafter learns from: the target's own distribution where the target chose freely, its token
elsewhere.

Under a grammar (or when sampled) the emitted token can differ from the target's first choice; the drafter is
judged by what was emitted, so such positions get that token as a hard label.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Labels(NamedTuple):
    """Targets over a reduced vocabulary of size K.

    `weights` [N, K] rows sum to 1 (soft or one-hot); `ids` [N] the emitted token's index in the vocabulary,
    -1 where it is not in it; such rows do not count.
    """

    weights: Tensor
    ids: Tensor

    @property
    def counted(self) -> Tensor:
        """[N] bool: rows whose emitted token the vocabulary holds."""
        return self.ids >= 0


@torch.no_grad()
def make_labels(
    final: Tensor, emitted: Tensor, head: Tensor, index_of: Tensor, bias: Tensor | None
) -> Labels:
    """Labels of N positions.

    Args:
        final: [N, H] the target's states after the final norm.
        emitted: [N] token ids that followed.
        head: [K, H] rows of the target's head. bias: [K] added to the logits (sampling correction), or None.
        index_of: [V] id → index among the K rows, -1 where absent.
    """
    logits = F.linear(final.to(head.dtype), head).float()
    if bias is not None:
        logits += bias
    ids = index_of[emitted]
    weights = logits.softmax(-1)
    forced = (~first_choice(weights, ids) & (ids >= 0)).nonzero()[:, 0]
    weights[forced] = 0.0
    weights[forced, ids[forced]] = 1.0
    return Labels(weights, ids)


class _SoftCrossEntropy(torch.autograd.Function):
    """Keeps only the gradient, in the logits' own type: a third of the plain formula's memory traffic."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits.to(torch.float32, copy=True)
        normaliser = wide.logsumexp(-1)
        loss: Tensor = normaliser - torch.linalg.vecdot(labels, wide)
        ctx.save_for_backward(wide.sub_(normaliser[:, None]).exp_().sub_(labels).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * grads[0][:, None].to(difference.dtype), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum of labels · log softmax(logits) by row: [N, K], [N, K] → [N] fp32. `labels` rows sum to 1."""
    loss: Tensor = _SoftCrossEntropy.apply(logits, labels)
    return loss


def first_choice(logits: Tensor, ids: Tensor) -> Tensor:
    """[N, K] logits, [N] indices → [N] bool: whether the index holds the largest logit (False for -1)."""
    chosen = logits.gather(-1, ids.clamp(min=0)[:, None])[:, 0]
    return (ids >= 0) & (chosen >= logits.amax(-1))


def index_map(ids: Tensor, vocab_size: int) -> Tensor:
    """The inverse of `ids` [K]: [V] int64, -1 for tokens that are not in it."""
    index = torch.full((vocab_size,), -1, dtype=torch.int64, device=ids.device)
    index[ids] = torch.arange(len(ids), device=ids.device)
    return index
