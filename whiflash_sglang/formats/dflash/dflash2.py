"""The DFlash2 drafter: DFlash's trunk with convolutions, and a selector among the likeliest candidates of every row.

    score_k(c) = unary_k(c) + <A[token_{k-1}] * P h_k, B[c]>, c among row k's candidates, token_0 the bonus token
    unary = cap · tanh(m · logits / cap), or m · logits without a cap

Each draft is the best candidate after the previous draft, so only one row of SGLang's lattice of pairs is computed.
Its confidence is its probability among the candidates, times the candidates' share of the whole vocabulary by unary
scores, since a token outside the candidates may be right. Numerics follow `DFlash2DraftModel` of SGLang 0.5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whiflash_sglang.formats.checkpoint import integer, number
from whiflash_sglang.formats.choice import Choice, DraftHead, choose
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter, block_format
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig, parse
from whiflash_sglang.formats.draft_format import merged
from whiflash_sglang.formats.packed import Linear

ARCHITECTURES = ("DFlash2DraftModel", "DFlash2BeamDraftModel", "MiniMaxDFlash2DraftModel")
_READ_HERE = ("selector_rank", "output_multiplier", "final_logit_softcapping")


@dataclass(frozen=True, slots=True)
class DFlash2Config(DFlashConfig):
    """DFlash2's settings. selector_rank: R. top: candidates per row. multiplier, softcap: m and cap; 0: no cap."""

    selector_rank: int = 0
    top: int = 0
    multiplier: float = 1.0
    softcap: float = 0.0


def read_dflash2(path: Path, config: Mapping[str, Any]) -> DFlash2Config:
    """Read `config.json`. Raises CheckpointError naming the field that does not fit."""
    settings = merged(path, config, "dflash_config")
    capped = settings.get("final_logit_softcapping")
    return parse(
        path,
        config,
        DFlash2Config,
        known=_READ_HERE,
        selector_rank=integer(settings, "selector_rank", path),
        top=integer(settings, "selector_top_k", path),
        multiplier=number(settings, "output_multiplier", path, default=1.0),
        softcap=number(settings, "final_logit_softcapping", path) if capped else 0.0,
    )


class CandidateSelector(nn.Module):
    """The selector's weights: A and B, [V, R] each, and P [R, H] of the module's formula."""

    def __init__(self, config: DFlash2Config) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.zeros(config.vocab_size, config.selector_rank))
        self.successor_codebook = nn.Parameter(torch.zeros(config.vocab_size, config.selector_rank))
        self.hidden_projection = Linear(config.hidden_size, config.selector_rank, bias=False)

    def scores(self, previous: Tensor, projected: Tensor, candidates: Tensor) -> Tensor:
        """Score `candidates` [B, K] after tokens `previous` [B] → [B, K]. projected: [B, R], P times the states."""
        keys = self.successor_codebook[candidates]
        return torch.einsum("br,bkr->bk", self.predecessor_codebook[previous] * projected, keys)


class DFlash2Drafter(DFlashDrafter):
    """A block drafter that chooses each token among candidates, given the token before it."""

    config: DFlash2Config

    def __init__(self, config: DFlash2Config, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Make an untrained drafter; see `DFlashDrafter`."""
        super().__init__(config, target_embedding, target_lm_head)
        self.candidate_selector = CandidateSelector(config)

    def propose(self, states: Tensor, bonus: Tensor, wanted: int, head: DraftHead) -> Choice:
        """Choose drafts among the candidates of every row; see `DFlashDrafter.propose`."""
        rows = self.draft_rows(states, wanted)
        logits = head.logits(rows.flatten(0, 1))
        ids, largest = head.candidates(logits, self.config.top)
        ids, unary = ids.view(len(rows), wanted, -1), self._unary(largest).view(len(rows), wanted, -1)
        of_all = unary.logsumexp(-1) - head.total(self._unary(logits)).view(len(rows), wanted)
        projected = self.candidate_selector.hidden_projection(rows)
        previous, tokens, sure = bonus, [], []
        for step in range(wanted):
            scores = unary[:, step] + self.candidate_selector.scores(previous, projected[:, step], ids[:, step])
            best = choose(scores)
            previous = ids[:, step].gather(-1, best.token[:, None])[:, 0]
            tokens.append(previous)
            sure.append(best.confidence)
        return Choice(torch.stack(tokens, 1), torch.stack(sure, 1) * of_all.exp())

    def _unary(self, logits: Tensor) -> Tensor:
        """Scale and cap logits of any shape."""
        scaled = logits * self.config.multiplier
        cap = self.config.softcap
        return cap * torch.tanh(scaled / cap) if cap else scaled


FORMAT = block_format(
    name="DFlash2",
    keys=ARCHITECTURES,
    read=read_dflash2,
    model=DFlash2Drafter,
    published="z-lab, incoai, lightseekorg",
    defined_by="SGLang's `dflash.py`",
    upstream="DFLASH",
)
