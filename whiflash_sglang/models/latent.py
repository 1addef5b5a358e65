"""Latent attention (MLA, arXiv 2405.04434, section 2.1) as attention with one head of keys and values.

What is kept of a token is its latent and, behind it, the one part of its key that is rotated. The projections that make
each head's keys and values of the latent are applied to queries and outputs instead, so a row attends to the latents
themselves: the key of an entry is its value, too, of which the rotated part is left out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whiflash_sglang.models.checkpoint import WeightReader, integer
from whiflash_sglang.models.layers import Angles, Attend, AttentionShape, RMSNorm, half_split, rotate
from whiflash_sglang.models.packed import Linear


class LatentShape(NamedTuple):
    """heads: of queries. query_rank: of the queries' own latent, None where they have none. rank: of the latent. plain,
    rotated: dimensions of a head's query that are not rotated, and that are. value: of a head's value. scale: what
    scores are multiplied by. pairs: whether neighbouring dimensions rotate together.
    """

    heads: int
    query_rank: int | None
    rank: int
    plain: int
    rotated: int
    value: int
    scale: float
    pairs: bool

    @property
    def kept(self) -> AttentionShape:
        """Heads as the draft KV keeps them."""
        return AttentionShape(self.heads, 1, self.rank + self.rotated)


def read_latent(path: Path, config: Mapping[str, Any], rope: Mapping[str, Any]) -> LatentShape:
    """DeepSeek's keys; `rope` as `rope_parameters` gives it. Raises `CheckpointError` naming the key that does not
    fit.
    """
    plain, rotated = (integer(config, f"qk_{part}_head_dim", path) for part in ("nope", "rope"))
    query_rank = config.get("q_lora_rank")
    return LatentShape(
        heads=integer(config, "num_attention_heads", path),
        query_rank=None if query_rank is None else integer(config, "q_lora_rank", path),
        rank=integer(config, "kv_lora_rank", path),
        plain=plain,
        rotated=rotated,
        value=integer(config, "v_head_dim", path),
        scale=(plain + rotated) ** -0.5 * _stretched(rope) ** 2,
        pairs=bool(config.get("rope_interleave", True)),
    )


class LatentAttention(nn.Module):
    """The projections of a layer with latent attention, without biases."""

    def __init__(self, hidden: int, latent: LatentShape, eps: float) -> None:
        super().__init__()
        self.latent, self.shape = latent, latent.kept
        heads, query = latent.heads, latent.heads * (latent.plain + latent.rotated)
        rank = latent.query_rank
        self.query_down = None if rank is None else Linear(hidden, rank, bias=False)
        self.query_norm = None if rank is None else RMSNorm(rank, eps)
        self.query = Linear(rank or hidden, query, bias=False)
        self.down = Linear(hidden, latent.rank + latent.rotated, bias=False)
        self.norm = RMSNorm(latent.rank, eps)
        self.up = nn.Parameter(torch.empty(heads, latent.plain + latent.value, latent.rank))
        self.out = Linear(heads * latent.value, hidden, bias=False)

    def forward(self, x: Tensor, angles: Angles, layer: int, attend: Attend) -> Tensor:
        """`x` [T, H] → [T, H]."""
        latent = self.latent
        narrow = x
        if self.query_down is not None and self.query_norm is not None:
            narrow = self.query_norm(self.query_down(x))
        q = self.query(narrow).view(len(x), latent.heads, -1)
        plain, turned = q.split([latent.plain, latent.rotated], dim=-1)
        keys, values = torch.split(self.up, [latent.plain, latent.value], dim=1)
        q = torch.cat([torch.einsum("thp,hpr->thr", plain, keys), rotate(turned, angles)], -1)
        # `attend` scales by the size of what is kept of a token.
        q = q * (latent.scale * self.shape.head_dim**0.5)
        k, v = self.keys_values(x, angles)
        mixed = attend(layer, q, k, v)[..., : latent.rank]
        out: Tensor = self.out(torch.einsum("thr,hvr->thv", mixed, values).flatten(1))
        return out

    def keys_values(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """`x` [T, H] → what is kept of each row [T, 1, rank + rotated], as key and as value."""
        latent, turned = self.down(x)[:, None].split([self.latent.rank, self.latent.rotated], dim=-1)
        kept = torch.cat([self.norm(latent), rotate(turned, angles)], -1)
        return kept, kept

    def fill(self, reader: WeightReader, prefix: str) -> None:
        """Read DeepSeek's names below `prefix`."""
        latent = self.latent
        if self.query_down is not None and self.query_norm is not None:
            reader.fill(self.query_down.weight, f"{prefix}q_a_proj.weight")
            reader.fill(self.query_norm.weight, f"{prefix}q_a_layernorm.weight")
        reader.fill(self.query.weight, f"{prefix}q_{'' if self.query_down is None else 'b_'}proj.weight")
        reader.fill(self.down.weight, f"{prefix}kv_a_proj_with_mqa.weight")
        reader.fill(self.norm.weight, f"{prefix}kv_a_layernorm.weight")
        reader.fill(self.up.detach().flatten(0, 1), f"{prefix}kv_b_proj.weight")
        reader.fill(self.out.weight, f"{prefix}o_proj.weight")
        if latent.pairs:
            q = self.query.weight.detach().view(latent.heads, latent.plain + latent.rotated, -1)
            turned, width = q[:, latent.plain :], latent.rotated
            turned.copy_(half_split(turned.flatten(0, 1), latent.heads, width).view_as(turned))
            key = self.down.weight.detach()[latent.rank :]
            key.copy_(half_split(key, 1, width))


def _stretched(rope: Mapping[str, Any]) -> float:
    """The factor of YaRN on queries and keys each, as DeepSeek has it: beside the angles, in the scores."""
    factor, weight = float(rope.get("factor", 1.0)), float(rope.get("mscale_all_dim") or 0)
    if rope["rope_type"] == "default" or factor <= 1:
        return 1.0
    return 0.1 * weight * math.log(factor) + 1.0
