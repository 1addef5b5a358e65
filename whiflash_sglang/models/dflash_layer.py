"""Layers of the block drafters' common trunk, and how their checkpoints name what is in them.

Numerics follow `sglang/srt/models/dflash.py` of SGLang 0.5.23.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang.models.checkpoint import WeightReader, attention_weights, mlp_weights
from whiflash_sglang.models.dflash_config import BlockConvolution, DFlashConfig
from whiflash_sglang.models.layers import (
    Angles,
    Attend,
    Attention,
    GemmaRMSNorm,
    RMSNorm,
    SwiGLU,
    half_split,
    rotary_width,
)
from whiflash_sglang.models.packed import Linear


class BlockConv(nn.Module):
    """Depthwise convolutions around a sublayer f, back over the rows of one block, whose kernels follow the input x.

    y = conv(f(conv(x, before)), after)        conv(x, w)_t = Σ_j w_tj · x_{t-j}, rows of the same block
    [before_t | after_t] = base + P x_t, one P x_t for every `group` channels
    """

    def __init__(self, size: int, shape: BlockConvolution) -> None:
        super().__init__()
        self.shape = shape
        base = torch.zeros(2, shape.taps, size)
        base[:, 0] = 1.0  # untrained: the sublayer alone
        self.base_kernel = nn.Parameter(base)
        self.kernel_projection = Linear(size, 2 * shape.taps * (size // shape.group), bias=False)

    def kernels(self, x: Tensor) -> Tensor:
        """`x` [T, H] → [2, T, taps, H], of the input and of the output."""
        taps, group = self.shape
        moved: Tensor = self.kernel_projection(x).view(len(x), 2, taps, -1).repeat_interleave(group, -1)
        return (self.base_kernel + moved).transpose(0, 1)

    def convolve(self, x: Tensor, kernel: Tensor, rows: int) -> Tensor:
        """`x` [T, H], whole blocks of `rows`, by `kernel` [T, taps, H] → [T, H]."""
        out = kernel[:, 0] * x
        blocks = x.view(-1, rows, x.shape[-1])
        for tap in range(1, min(self.shape.taps, rows)):
            earlier = F.pad(blocks[:, :-tap], (0, 0, tap, 0)).view_as(x)
            out = out + kernel[:, tap] * earlier
        return out

    def fill(self, reader: WeightReader, prefix: str) -> None:
        """From the checkpoint's tensors; raises `CheckpointError` naming what is missing or does not fit."""
        reader.fill(self.base_kernel, f"{prefix}base_kernel")
        reader.fill(self.kernel_projection.weight, f"{prefix}kernel_projection.weight")


class DFlashLayer(nn.Module):
    """A decoder layer; its K and V are computed in the same way from the context."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        norm = norm_of(config)
        self.input_norm = norm(size, eps)
        self.attention = Attention(
            size, size, config.attention, head_norm_eps=eps, bias=config.attention_bias, norm=norm
        )
        self.mlp_norm = norm(size, eps)
        self.mlp = SwiGLU(size, config.intermediate_size, config.clamped)
        self.convolutions = nn.ModuleDict()
        if config.convolution is not None:
            for name in ("attention_conv", "mlp_conv"):
                self.convolutions[name] = BlockConv(size, config.convolution)

    def forward(self, hidden: Tensor, angles: Angles, index: int, attend: Attend, rows: int) -> Tensor:
        """`hidden` [T, H], whole blocks of `rows`, which is given up, → [T, H]."""

        def attention(x: Tensor) -> Tensor:
            mixed: Tensor = self.attention(x, angles, index, attend)
            return mixed

        attended = self._within("attention_conv", attention, self.input_norm(hidden), rows)
        hidden, normed = self.mlp_norm.add(hidden, attended)
        return hidden + self._within("mlp_conv", self.mlp, normed, rows)

    def _within(self, name: str, sublayer: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """`sublayer` of `x` [T, H], between its convolutions where the checkpoint has them."""
        if name not in self.convolutions:
            return sublayer(x)
        around: Any = self.convolutions[name]
        before, after = around.kernels(x)
        mixed: Tensor = around.convolve(sublayer(around.convolve(x, before, rows)), after, rows)
        return mixed

    def fill(self, reader: WeightReader, prefix: str) -> None:
        """From the checkpoint's tensors; raises `CheckpointError` naming what is missing or does not fit."""
        reader.fill_attention(self.attention, f"{prefix}self_attn.")
        reader.fill_mlp(self.mlp, f"{prefix}mlp.")
        reader.fill(self.input_norm.weight, f"{prefix}input_layernorm.weight")
        reader.fill(self.mlp_norm.weight, f"{prefix}post_attention_layernorm.weight")
        convolutions: Any = self.convolutions.items()
        for name, convolution in convolutions:
            convolution.fill(reader, f"{prefix}{name}.")


def norm_of(config: DFlashConfig) -> type[RMSNorm]:
    """The kind of norm that a checkpoint has throughout."""
    return GemmaRMSNorm if config.gemma_norm else RMSNorm


@torch.no_grad()
def fold_variants(config: DFlashConfig, attention: Attention) -> None:
    """Variants that are plain attention with other weights: V's scale, and RoPE over neighbouring dimensions."""
    heads, kv_heads, head_dim = attention.shape
    rotated = (heads + kv_heads) * head_dim
    width = rotary_width(config.rope, head_dim)
    for rows in (attention.qkv.weight, attention.qkv.bias):
        if rows is not None:
            rows[rotated:] *= config.value_scale
            if config.neighbours:
                rows[:rotated] = half_split(rows[:rotated], heads + kv_heads, width)
    if config.neighbours and attention.q_norm is not None and attention.k_norm is not None:
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.copy_(half_split(norm.weight, 1, width))


def layer_weights(layer: Any, prefix: str) -> dict[str, Tensor]:
    """The inverse of `DFlashLayer.fill`, of a plain layer."""
    return {
        **attention_weights(layer.attention, f"{prefix}self_attn."),
        **mlp_weights(layer.mlp, f"{prefix}mlp."),
        f"{prefix}input_layernorm.weight": layer.input_norm.weight,
        f"{prefix}post_attention_layernorm.weight": layer.mlp_norm.weight,
    }
