"""The autoregressive arm: a chain that drafts a token a step (EAGLE-3, arXiv 2503.01840, section 3)."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from whiflash_sglang import arms
from whiflash_sglang.cache.features import FeatureSlice
from whiflash_sglang.core import DraftBatch, Drafts, PassInput
from whiflash_sglang.drafters.paged import PagedArm
from whiflash_sglang.models.choice import Choice, DraftStep
from whiflash_sglang.models.dflash_config import LayerSpan
from whiflash_sglang.models.layers import Attend, AttentionShape


class ChainModel(Protocol):
    """A drafter that drafts token after token; shapes as in `Eagle3Drafter`."""

    @property
    def draft_vocab_size(self) -> int: ...

    def fuse(self, features: Tensor) -> Tensor: ...

    def __call__(self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> DraftStep: ...

    def choose(self, logits_hidden: Tensor) -> Choice: ...


class ChainArm(PagedArm):
    """Chain of up to `steps` drafts; it ends where another pass is not expected to pay.

    Entry p pairs feature p with the embedding of token p+1, at slot and RoPE position p. A chain's first step
    runs all of the model at position n-1; every later step feeds back the drafter's own hidden state.

    Args:
        model: loaded checkpoint. depth: its layers.
        shape: heads of a layer. weight: one of its matrices, which says dtype and device.
        captured: the union of layers that the target captures, in layer order.
        layers: the checkpoint's own, in the order in which it reads them. width: columns of their outputs.
        steps: drafts of a round at most.
    """

    arm = arms.AR

    def __init__(
        self,
        model: ChainModel,
        depth: int,
        shape: AttentionShape,
        weight: Tensor,
        captured: tuple[int, ...],
        layers: tuple[int, ...],
        width: int,
        steps: int,
    ) -> None:
        super().__init__(depth, shape, weight.dtype, weight.device)
        self._chain = model
        self._spans = (LayerSpan(causal=True),) * depth
        self.captured_layers = layers
        self.max_drafts = steps
        self.tail_width = width
        self.features = FeatureSlice(captured, layers, width // len(layers))

    def chain(self, given: PassInput, steps: int) -> Iterator[Choice]:
        """The chain, step by step: of every request the target's id [G] and how sure the drafter is of it [G].

        Nothing is read on the host between steps; who may read stops before.
        """
        positions, slots, _ = given.rows_from(-1, steps)
        token, hidden = given.bonus, self._chain.fuse(given.tail)
        for step in range(steps):
            attend = self.attend_at(slots[:, step], given, self._spans, extra=step, width=1)
            out = self._chain(token, hidden, positions[:, step], attend)
            choice = self._chain.choose(out.logits_hidden)
            token, hidden = choice.token, out.hidden
            yield choice

    def whole(self, given: PassInput, wanted: int) -> Choice:
        tokens, confidences = zip(*self.chain(given, wanted), strict=True)
        return Choice(torch.stack(tokens, 1), torch.stack(confidences, 1))

    def logits_at_once(self, requests: int) -> int:
        return requests * self._chain.draft_vocab_size

    def draft(self, batch: DraftBatch) -> Drafts:
        # Where reading would wait for the device, at every step, or all steps are one launch, running all costs less.
        if not batch.host.exact or self.captured_for(batch):
            choice = self.choices(batch)
            return self.cut(choice.token, choice.confidence, batch, passes=choice.token.shape[1])
        tokens, confidences = [], []
        for choice in self.chain(PassInput.of(batch), max(batch.limits)):
            tokens.append(choice.token)
            confidences.append(choice.confidence)
            if not self.length.goes_on(confidences, batch):
                break
        return self.cut(torch.stack(tokens, 1), torch.stack(confidences, 1), batch, passes=len(tokens))
