"""Draft models as the catch-up kernels take them: weights laid out once, at load."""

from typing import Any

import torch
from whiflash_kernels import DFlashWeights, Eagle3Weights

from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.packed import pack
from whiflash_sglang.models.rope import Rotary


def _without_gradients(weight: torch.Tensor) -> torch.Tensor:
    """Itself where it wants none: a packed copy stays with the tensor object, and one is enough."""
    return weight.detach() if weight.requires_grad else weight


def dflash_weights(model: DFlashDrafter) -> DFlashWeights:
    """K and V projections of all layers stacked, so that one product serves the whole catch-up."""
    layers: list[Any] = list(model.layers)
    attentions = [layer.attention for layer in layers]
    biased = model.config.attention_bias
    weights = DFlashWeights(
        fc=_without_gradients(model.fc.weight),
        hidden_norm=model.hidden_norm.scale().detach(),
        kv=torch.cat([a.qkv.weight.detach()[a.query_size :] for a in attentions]),
        k_norm=torch.stack([a.k_norm.scale().detach() for a in attentions]),
        eps=model.config.rms_norm_eps,
        kv_bias=torch.cat([a.qkv.bias.detach()[a.query_size :] for a in attentions]) if biased else None,
    )
    pack([weights.fc, weights.kv])
    return weights


def eagle3_weights(model: Eagle3Drafter) -> Eagle3Weights:
    """Of a one-layer drafter; the norm variants before `fc` included."""
    layer: Any = model.layers[0]
    attention = layer.attention
    norms: list[Any] = list(model.fc_norm or ())
    weights = Eagle3Weights(
        fc=_without_gradients(model.fc.weight),
        embedding=model.target_embedding,
        input_norm=layer.embedding_norm.weight.detach(),
        hidden_norm=layer.hidden_norm.weight.detach(),
        kv=attention.qkv.weight.detach()[attention.query_size :],
        kv_bias=None if attention.qkv.bias is None else attention.qkv.bias.detach()[attention.query_size :],
        k_norm=None if attention.k_norm is None else attention.k_norm.weight.detach()[None],
        eps=model.config.rms_norm_eps,
        fc_bias=None if model.fc.bias is None else model.fc.bias.detach(),
        chunk_norms=torch.stack([norm.weight.detach() for norm in norms]) if norms else None,
        concat_norm=None if model.input_norm is None else model.input_norm.weight.detach(),
    )
    pack([weights.fc, weights.kv])
    return weights


def rope_table(rotary: Rotary, positions: int, device: torch.device) -> torch.Tensor:
    """[positions, head_dim] float32: cosines in the first half, sines in the second."""
    return rotary.angles(torch.arange(positions, device=device)).table
