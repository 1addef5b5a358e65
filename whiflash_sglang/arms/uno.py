"""The arm `uno`: the target drafts for itself, under an adapter of its own (sglang#37667)."""

from collections.abc import Sequence
from typing import Any

import torch
from whiflash_kernels import Drafts

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.arms.length import DraftLength
from whiflash_sglang.drafts import arms
from whiflash_sglang.formats.choice import choose
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import DraftBatch
from whiflash_sglang.records.request import Request

LOGIT_BYTES = 6
"""Peak bytes per logit of the pass: in the head's dtype and in 32 bits."""


class UnoArm(TextDrafter):
    """Drafts a block in one causal pass of the target: the bonus token at position n, then noise tokens.

    The bonus token's row runs without the adapter, so the first draft is the target's own token. The other rows' KV is
    provisional: a verification writes over it before anything reads it. Noise depends on positions only, so a repeated
    round drafts the same.

    Args:
        model: the target under its adapter (`engine/forward/adapted.py`). drafts: most drafts of a pass, one per row.
    """

    arm = arms.UNO
    proposes = False
    passes = fills = True

    def __init__(self, model: Any, drafts: int) -> None:
        self.model, self.max_drafts, target = model, drafts, model.target
        self.length = DraftLength(target.device)
        positions, random = target.context_len + drafts, torch.Generator().manual_seed(target.random_seed)
        self._noise = torch.randint(model.vocabulary, (positions,), generator=random).to(target.device)

    def captured_bytes(self, requests: int) -> int:
        return int(requests * self.max_drafts * self.model.vocabulary * LOGIT_BYTES)

    def bytes_for(self, rows: int) -> int:
        """Return the bytes of the noise and, since passes are not captured, of a pass for `rows` requests."""
        return self._noise.nbytes + self.captured_bytes(rows)

    def draft(self, batch: DraftBatch) -> Drafts:
        wanted = max(batch.limits)
        places = batch.starts[:, None] + torch.arange(1, wanted, device=batch.starts.device)
        chosen = choose(self.model.logits(batch, self._noise[places]))
        tokens, confidences = (part.view(len(batch), wanted) for part in chosen)
        counts, alive = self.length.cut(confidences, batch)
        return Drafts(tokens, counts, alive, confidences)

    def calibration(self, requests: Sequence[Request], worth: Worth) -> Sequence[float]:
        """Return the acceptance chance per confidence bin, their mean, and the accepted tokens that pay for a row."""
        return self.length.calibration(worth)

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        self.length.observe(proposed, accepted, confidences)
