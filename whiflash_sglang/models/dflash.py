"""The DFlash block drafter (arXiv 2602.06036) in the `DFlashDraftModel` checkpoint format, without SGLang.

A block is the last committed (bonus) token followed by mask tokens; one non-causal pass drafts them all. The
context enters only as extra K/V, projected by every layer from one fused feature per token. Embedding and LM
head are the target's. Numerics follow `sglang/srt/models/dflash.py` of SGLang 0.5.23.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import (
    WeightReader,
    attention_weights,
    read_weights,
    write_checkpoint,
)
from whiflash_sglang.models.dflash_config import DFlashConfig
from whiflash_sglang.models.layers import Attend, Attention, RMSNorm, SwiGLU
from whiflash_sglang.models.rope import Rotary, rotate


class _Layer(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(size, eps)
        self.attention = Attention(size, size, config.attention, head_norm_eps=eps)
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = SwiGLU(size, config.intermediate_size)


class DFlashDrafter(nn.Module):
    """A block-diffusion drafter.

    Attributes: `target_embedding` and `target_lm_head` [V, H], the target's, not part of the checkpoint.
    """

    target_embedding: Tensor
    target_lm_head: Tensor

    def __init__(self, config: DFlashConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Untrained."""
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(size, eps)
        self.rotary = Rotary(config.rope, config.attention.head_dim, config.max_position_embeddings)
        self.register_buffer("target_embedding", target_embedding, persistent=False)
        self.register_buffer("target_lm_head", target_lm_head, persistent=False)
        self._context: tuple[Tensor, Tensor] | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block, the bonus token included."""
        return self.config.block_size

    @property
    def mask_token_id(self) -> int:
        """The token at the positions to be drafted."""
        return self.config.mask_token_id

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """Target layers whose outputs `fuse` takes, in its order."""
        return self.config.target_layer_ids

    @property
    def num_layers(self) -> int:
        """Draft layers, each with K/V of its own."""
        return self.config.num_layers

    def fuse(self, features: Tensor) -> Tensor:
        """`features` [T, len(target_layer_ids) · H] → the context feature [T, H] that all layers share."""
        fused: Tensor = self.hidden_norm(self.fc(features))
        return fused

    def keys_values(self, fused: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """KV-only pass for every layer at once, one projection: `fused` [T, H], `positions` [T].

        Returns k and v, each [layers, T, Hkv, D], k normed and rotated. Exact for any number of layers.
        """
        _, kv_heads, head_dim = self.config.attention
        weight, k_norm = self._context_projection()
        kv = F.linear(fused, weight).view(len(fused), self.num_layers, 2, kv_heads, head_dim)
        k, v = kv.permute(2, 1, 0, 3, 4)
        k = F.rms_norm(k, (head_dim,), None, self.config.rms_norm_eps) * k_norm.to(k.dtype)
        rotated = rotate(k.flatten(0, 1), _repeat(self.rotary.angles(positions), self.num_layers))
        return rotated.view(k.shape), v

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Blocks: bonus and mask ids [T] int64 at `positions` [T] → final-normed states [T, H]."""
        hidden = F.embedding(tokens, self.target_embedding)
        angles = self.rotary.angles(positions)
        layers: list[Any] = list(self.layers)
        for index, layer in enumerate(layers):
            hidden = hidden + layer.attention(layer.input_norm(hidden), angles, index, attend)
            hidden = hidden + layer.mlp(layer.mlp_norm(hidden))
        normed: Tensor = self.norm(hidden)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] → [T, V], by the target's head."""
        return F.linear(hidden, self.target_lm_head)

    def train(self, mode: bool = True) -> "DFlashDrafter":
        """Switch modes; the stacked projection is kept in evaluation mode only."""
        super().train(mode)
        self._context = None if mode else self._stack()
        return self

    def _context_projection(self) -> tuple[Tensor, Tensor]:
        return self._stack() if self._context is None else self._context

    def _stack(self) -> tuple[Tensor, Tensor]:
        """K and V rows of all layers [layers · 2 · Hkv · D, H], and their K norms [layers, 1, 1, D]."""
        attentions: list[Any] = [layer.attention for layer in self.layers]
        weight = torch.cat([attention.qkv.weight[attention.query_size :] for attention in attentions])
        return weight, torch.stack([attention.k_norm.weight for attention in attentions])[:, None, None]

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        target_embedding: Tensor,
        target_lm_head: Tensor,
    ) -> "DFlashDrafter":
        """Read a checkpoint directory. Raises `CheckpointError` naming what is missing or does not fit."""
        config = DFlashConfig.read(path)
        vocab, hidden = target_embedding.shape
        if hidden != config.hidden_size:
            raise CheckpointError(
                f"{path}: this DFlash drafter is for a target of hidden size {config.hidden_size}, "
                f"the embedding handed in has {hidden}"
            )
        if config.mask_token_id >= vocab:
            raise CheckpointError(
                f"{path}: mask_token_id {config.mask_token_id} is outside the target's vocabulary of {vocab}"
            )
        weights = {name.removeprefix("model."): tensor for name, tensor in read_weights(path).items()}
        reader = WeightReader(path, weights)
        drafter = cls(config, target_embedding, target_lm_head)
        for name in ("fc", "hidden_norm", "norm"):
            reader.fill(drafter.get_parameter(f"{name}.weight"), f"{name}.weight")
        for index, layer in enumerate(drafter.layers):
            _fill_layer(reader, layer, f"layers.{index}.")
        return drafter.to(device=device, dtype=dtype).eval()

    def save(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `config.json` and `model.safetensors`; SGLang's `DFLASH` loads the result as it is."""
        weights = {
            f"{name}.weight": self.get_parameter(f"{name}.weight") for name in ("fc", "hidden_norm", "norm")
        }
        tensors: dict[str, Tensor] = dict(weights)
        for index, layer in enumerate(self.layers):
            tensors.update(_layer_weights(layer, f"layers.{index}."))
        write_checkpoint(path, self.config.to_json(), tensors, dtype)


def _repeat(angles: tuple[Tensor, Tensor], times: int) -> tuple[Tensor, Tensor]:
    return angles[0].repeat(times, 1, 1), angles[1].repeat(times, 1, 1)


def _fill_layer(reader: WeightReader, layer: Any, prefix: str) -> None:
    reader.fill_attention(layer.attention, f"{prefix}self_attn.")
    reader.fill(layer.mlp.gate_up.weight, f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
    reader.fill(layer.mlp.down.weight, f"{prefix}mlp.down_proj.weight")
    reader.fill(layer.input_norm.weight, f"{prefix}input_layernorm.weight")
    reader.fill(layer.mlp_norm.weight, f"{prefix}post_attention_layernorm.weight")


def _layer_weights(layer: Any, prefix: str) -> dict[str, Tensor]:
    gate, up = layer.mlp.gate_up.weight.chunk(2)
    return {
        **attention_weights(layer.attention, f"{prefix}self_attn."),
        f"{prefix}mlp.gate_proj.weight": gate,
        f"{prefix}mlp.up_proj.weight": up,
        f"{prefix}mlp.down_proj.weight": layer.mlp.down.weight,
        f"{prefix}input_layernorm.weight": layer.input_norm.weight,
        f"{prefix}post_attention_layernorm.weight": layer.mlp_norm.weight,
    }
