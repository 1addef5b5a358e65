"""The xPress drafter (arXiv 2608.02438): DFlash's trunk, and a causal refiner that corrects a block in a few passes.

    x_k = W_in · [D_h h_k | D_g mean(h) | W1[token_{k-1}]]      y_k = x_k + Σ_{j≤k} L_kj * x_j
    logits_k = head · h_k + W2 · (y_k + down(silu(gate(y_k)) · up(y_k)))

A pass reads the tokens of the previous pass; the first pass reads the trunk's drafts. Draft k is final after k
passes. In training, the bonus token's row read the token before the bonus token. vLLM 0.33 (`qwen3_xpress.py`) reads
the bonus token there, and so does this module. Otherwise numerics follow `XPressRefinerHead` of speculators 0.9.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang.formats.checkpoint import MOST_ROWS, integer
from whiflash_sglang.formats.choice import Choice, DraftHead
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter, block_format
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig, parse
from whiflash_sglang.formats.draft_format import merged
from whiflash_sglang.formats.packed import Linear

_MATRICES = {"token_embed": "w1", "readout": "w2"} | {name: name for name in ("down_h", "down_g", "in_proj")}
_MATRICES |= {f"mlp_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
"""Matrix of the refiner in speculators' files → its name in files that vLLM serves."""


@dataclass(frozen=True, slots=True)
class XPressConfig(DFlashConfig):
    """xPress's settings. rank, mlp_size: of the refiner. passes: number of passes that correct a block."""

    rank: int = 0
    mlp_size: int = 0
    passes: int = 0


def read_refiner(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields that `XPressConfig` adds, and `from_anchor`. Raises CheckpointError naming the field at fault."""
    settings = merged(path, config, "dflash_config")
    rank = integer(settings, "xpress_rank", path, default=256)
    ratio = integer(settings, "xpress_mlp_ratio", path, default=2)
    passes = integer(settings, "num_jacobi_passes", path, maximum=MOST_ROWS, default=6)
    return {
        "from_anchor": bool(settings.get("sample_from_anchor", False)),
        "rank": rank,
        "mlp_size": integer(settings, "xpress_mlp_hidden", path, default=ratio * rank),
        "passes": integer(settings, "xpress_num_passes", path, maximum=MOST_ROWS, default=passes),
    }


class Refiner(nn.Module):
    """Computes W2's input for every row of a block, causally from the tokens before the rows."""

    def __init__(self, config: XPressConfig) -> None:
        super().__init__()
        size, rank, inner, rows = config.hidden_size, config.rank, config.mlp_size, config.block_size
        self.w1 = nn.Embedding(config.vocab_size, rank)
        self.down_h = Linear(size, rank, bias=False)
        self.down_g = Linear(size, rank, bias=False)
        self.in_proj = Linear(3 * rank, rank, bias=False)
        self.mix = nn.ParameterDict({"L": torch.zeros(rank, rows, rows)})
        shapes = {"gate_proj": (rank, inner), "up_proj": (rank, inner), "down_proj": (inner, rank)}
        self.mlp = nn.ModuleDict({name: Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.w2 = Linear(rank, config.draft_vocab_size or config.vocab_size, bias=False)

    def rows(self, states: Tensor) -> Tensor:
        """Compute the part of the input that all passes share: `states` [B, rows, H] → [B, rows, 2R]."""
        block = self.down_g(states.mean(1, keepdim=True))
        return torch.cat([self.down_h(states), block.expand(-1, states.shape[1], -1)], -1)

    def forward(self, rows: Tensor, before: Tensor) -> Tensor:
        """Compute W2's input [B, W, R] from `rows` [B, W, 2R] and the tokens `before` them [B, W]."""
        x = self.in_proj(torch.cat([rows, self.w1(before)], -1))
        y = x + torch.einsum("rkj,bjr->bkr", self.mix["L"][:, : x.shape[1], : x.shape[1]].tril(), x)
        latent: Tensor = y + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))
        return latent


class XPressDrafter(DFlashDrafter):
    """A block drafter that corrects all tokens together, each by the tokens before it in the block."""

    config: XPressConfig
    logits_held = 2
    renamed: ClassVar[dict[str, str]] = {
        **DFlashDrafter.renamed,
        "refiner_head.mix_l": "xpress_head.mix.L",
        **{f"refiner_head.{a}.weight": f"xpress_head.{b}.weight" for a, b in _MATRICES.items()},
    }

    def __init__(self, config: XPressConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Make an untrained drafter; see `DFlashDrafter`."""
        super().__init__(config, target_embedding, target_lm_head)
        self.xpress_head = Refiner(config)

    @property
    def head(self) -> DraftHead:
        """The checkpoint's own head, else the target's, with W2 as its second matrix."""
        return super().head.beside(self.xpress_head.w2.weight)

    def propose(self, states: Tensor, bonus: Tensor, wanted: int, head: DraftHead) -> Choice:
        """Choose drafts with the trunk, then correct all of them in every pass. Confidences are the last pass's."""
        logits = head.logits(self.draft_rows(states, wanted).flatten(0, 1))
        first = bonus[:, None].expand(-1, 2 - self.config.from_anchor)
        rows = self.xpress_head.rows(states)[:, : first.shape[1] + wanted - 1]
        choice = head.choose(logits)
        for _ in range(self.config.passes):
            token = head.target_ids(choice.token).view(-1, wanted)
            latent = self.xpress_head(rows, torch.cat([first, token[:, :-1]], 1))[:, -wanted:]
            choice = head.choose(head.second(latent.flatten(0, 1)).add_(logits))
        return Choice(head.target_ids(choice.token).view(-1, wanted), choice.confidence.view(-1, wanted))


FORMAT = block_format(
    name="xPress",
    keys=("Qwen3XPressModel",),
    read=lambda path, config: parse(path, config, XPressConfig, **read_refiner(path, config)),
    model=XPressDrafter,
    published="UIUC-SSAIL",
    defined_by="speculators; vLLM's `qwen3_xpress.py`",
    upstream=None,
)
