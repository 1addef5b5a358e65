"""LiLiCorr (arXiv 2608.20530): DFlash's trunk, and a small transformer over the likeliest candidates of all rows.

    x_kc = E'[c] + P h_k + mlp(features of c's probability) + slot_k + rank_c, attended over all candidates of the block
    f_kc = silu(F · [x_kc | a | x_kc * a]), a the context feature of the token before the bonus token
    score_1(c) = γ <out(a), in(f_1c)>      score_k(c) = γ <out(f_{k-1,d}), in(f_kc)>, d the draft before; unit vectors

Each draft is the best candidate behind the one before it; its confidence is its share among the candidates, times their
probability: what is no candidate may be right, too. Numerics follow `sglang/srt/models/lilicorr.py` of SGLang 0.5.23,
greedily.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang import arms
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import WeightReader, integer, number
from whiflash_sglang.models.choice import Choice, DraftHead, choose
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.dflash_config import DFlashConfig, parse
from whiflash_sglang.models.draft_format import DraftFormat, merged
from whiflash_sglang.models.layers import RMSNorm
from whiflash_sglang.models.packed import Linear

ARCHITECTURE = "LiLiCorrDraftModel"
FEATURES = 5
"""Features of a candidate: log-probability, probability, distance from the best, rank, whether it is the best."""


@dataclass(frozen=True, slots=True)
class LiLiCorrConfig(DFlashConfig):
    """Of the head: top, candidates of a row; width, layers, heads, expansion of its transformer; factor, size of the
    unit vectors, which are normed with `epsilon`; scale, γ.
    """

    top: int = 0
    width: int = 0
    layers: int = 0
    heads: int = 0
    expansion: float = 0.0
    factor: int = 0
    epsilon: float = 0.0
    scale: float = 0.0


def read_lilicorr(path: Path, config: Mapping[str, Any]) -> LiLiCorrConfig:
    """From `config.json`. Raises CheckpointError naming the field that does not fit."""
    settings = merged(path, config, "dflash_config")
    if settings.get("lilicorr_enabled") is False:
        raise CheckpointError(
            f"{path}/config.json: lilicorr_enabled is false; {ARCHITECTURE} is its head's name"
        )
    hidden = integer(settings, "hidden_size", path)
    width = integer(settings, "lilicorr_hidden_size", path, minimum=0) or hidden
    heads = integer(settings, "lilicorr_num_heads", path)
    if width % heads:
        raise CheckpointError(
            f"{path}/config.json: lilicorr_num_heads {heads} does not divide the head's width of {width}"
        )
    return parse(
        path,
        config,
        LiLiCorrConfig,
        top=integer(settings, "lilicorr_candidate_topk", path),
        width=width,
        layers=integer(settings, "lilicorr_num_layers", path),
        heads=heads,
        expansion=number(settings, "lilicorr_mlp_ratio", path),
        factor=integer(settings, "lilicorr_factor_dim", path),
        epsilon=number(settings, "lilicorr_vector_eps", path),
        scale=number(settings, "lilicorr_logit_scale", path),
    )


class _MLP(nn.Module):
    def __init__(self, size: int, inner: int, out: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Linear(size, inner), Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down_proj(F.silu(self.up_proj(x)))
        return mixed


class _Attention(nn.Module):
    """Named as `nn.MultiheadAttention` names its weights."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size))
        self.out_proj = Linear(size, size)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`x` [B, N, h], `bias` [heads, N, N] → [B, N, h]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.out_proj(
            F.scaled_dot_product_attention(q, k, v, bias[None]).transpose(1, 2).flatten(2)
        )
        return mixed


class _Layer(nn.Module):
    def __init__(self, config: LiLiCorrConfig) -> None:
        super().__init__()
        width, eps = config.width, config.rms_norm_eps
        self.attn_norm, self.mlp_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.attn = _Attention(width, config.heads)
        self.mlp = _MLP(width, int(width * config.expansion), width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), bias)
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


class LatticeHead(nn.Module):
    """Scores of candidates behind one another; parameters go by their names in a file."""

    def __init__(self, config: LiLiCorrConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width, slots = config.hidden_size, config.width, config.block_size - 1
        self.token_proj = None if width == hidden else Linear(hidden, width)
        self.pass_hidden_proj, self.context_proj = Linear(hidden, width), Linear(hidden, width)
        self.feature_norm = nn.LayerNorm(FEATURES)
        self.feature_mlp = _MLP(FEATURES, width, width)
        self.slot_embedding = nn.Parameter(torch.zeros(1, 1, slots, 1, width))
        self.rank_embedding = nn.Parameter(torch.zeros(1, 1, 1, config.top, width))
        self.relative_slot_bias = nn.Parameter(torch.zeros(config.heads, 2 * config.block_size - 1))
        self.same_slot_bias = nn.Parameter(torch.zeros(config.heads))
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.output_norm, self.anchor_norm = (RMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.factor_input_proj = Linear(3 * width, width)
        self.out_head, self.in_head, self.anchor_out_head = (Linear(width, config.factor) for _ in range(3))

    def forward(
        self, embedded: Tensor, chances: Tensor, rows: Tensor, anchor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores of the first row's candidates [B, K], and of a row's behind each of the row before [B, W-1, K, K].

        Args:
            embedded: [B, W, K, H], the candidates' embeddings. chances: [B, W, K] float32, their log-probabilities, the
                likeliest first. rows: [B, W, H], final-normed states. anchor: [B, H], a context feature.
        """
        size, slots, top = chances.shape
        x = embedded if self.token_proj is None else self.token_proj(embedded)
        x = x + self.pass_hidden_proj(rows)[:, :, None] + self._of_chances(chances, x.dtype)
        x = (x + self.slot_embedding[0, :, :slots] + self.rank_embedding[0]).flatten(1, 2)
        bias = self._bias(slots, x.device)
        for layer in self.layers:
            x = layer(x, bias)
        x = self.output_norm(x).view(size, slots, top, -1)
        context = self.anchor_norm(self.context_proj(anchor))
        beside = context[:, None, None].expand_as(x)
        factors = F.silu(self.factor_input_proj(torch.cat([x, beside, x * beside], -1)))
        away, towards = self._unit(self.out_head(factors)), self._unit(self.in_head(factors))
        begin = torch.einsum("bf,bkf->bk", self._unit(self.anchor_out_head(context)), towards[:, 0])
        pairs = away[:, :-1] @ towards[:, 1:].transpose(-1, -2)
        return self.config.scale * begin.float(), self.config.scale * pairs.float()

    def _of_chances(self, chances: Tensor, dtype: torch.dtype) -> Tensor:
        top = chances.shape[-1]
        rank = torch.arange(top, device=chances.device) / max(top - 1, 1)
        best = (rank == 0).float()
        said = [chances, chances.exp(), chances - chances.amax(-1, keepdim=True), rank, best]
        stacked = torch.stack([one.expand_as(chances) for one in said], -1)
        mixed: Tensor = self.feature_mlp(self.feature_norm(stacked.to(dtype)))
        return mixed

    def _bias(self, slots: int, device: torch.device) -> Tensor:
        """[heads, N, N] of N = slots * top candidates: by the number of rows between two, and whether it is 0."""
        slot = torch.arange(slots, device=device).repeat_interleave(self.config.top)
        apart = slot[:, None] - slot[None]
        return self.relative_slot_bias[:, apart + self.config.block_size - 1] + torch.where(
            apart == 0, self.same_slot_bias[:, None, None], 0
        )

    def _unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1, eps=self.config.epsilon)


class LiLiCorrDrafter(DFlashDrafter):
    """A block drafter whose tokens are chosen among candidates that all rows' candidates have judged."""

    config: LiLiCorrConfig
    reads_tail = True

    def __init__(self, config: LiLiCorrConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Untrained."""
        super().__init__(config, target_embedding, target_lm_head)
        self.lilicorr = LatticeHead(config)

    def fill(self, reader: WeightReader) -> None:
        """From the checkpoint's tensors; raises `CheckpointError` naming what is missing or does not fit."""
        super().fill(reader)
        for name, parameter in self.lilicorr.named_parameters():
            reader.fill(parameter, f"lilicorr.{name}")

    def propose(
        self, states: Tensor, bonus: Tensor, wanted: int, head: DraftHead, tail: Tensor | None = None
    ) -> Choice:
        """As `DFlashDrafter.propose`; all of the block's candidates are judged together, however few are `wanted`."""
        assert tail is not None
        rows = self.draft_rows(states, states.shape[1] - 1)
        logits = head.logits(rows.flatten(0, 1))
        ids, largest = head.candidates(logits, self.config.top)
        chances = (largest - head.total(logits)[:, None]).view(*rows.shape[:2], -1)
        ids = ids.view(chances.shape)
        embedded = self.embed(ids.flatten()).view(*ids.shape, -1)
        begin, pairs = self.lilicorr(embedded, chances, rows, self.fuse(tail))
        places: list[Tensor] = []
        sure: list[Tensor] = []
        for step in range(wanted):
            scores = (
                pairs[:, step - 1][torch.arange(len(rows), device=rows.device), places[-1]] if step else begin
            )
            best = choose(scores)
            places.append(best.token)
            sure.append(best.confidence)
        tokens = ids[:, :wanted].gather(-1, torch.stack(places, 1)[..., None])[..., 0]
        return Choice(tokens, torch.stack(sure, 1) * chances[:, :wanted].exp().sum(-1))


FORMAT = DraftFormat(
    name="LiLiCorr",
    arm=arms.DIFFUSION,
    keys=(ARCHITECTURE,),
    layers_key="target_layer_ids",
    read=read_lilicorr,
    model=LiLiCorrDrafter,
    published="its authors (arXiv 2608.20530)",
    defined_by="SGLang's `lilicorr.py`",
)
