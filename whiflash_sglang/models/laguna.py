"""Laguna's DFlash: gated attention, a norm for every captured feature, the context normed again by every layer.

    fused = norm(fc · [norm_i(feature_i)])
    K, V of layer l = W_l · norm_l(fused)
    out = o · (attended · softplus(g · x))

Numerics follow `DFlashLagunaForCausalLM` of SGLang 0.5.23.
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
from whiflash_sglang.models.checkpoint import WeightReader
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.dflash_config import DFlashConfig, parse
from whiflash_sglang.models.dflash_layer import DFlashLayer, norm_of
from whiflash_sglang.models.draft_format import DraftFormat
from whiflash_sglang.models.layers import Attention, RMSNorm
from whiflash_sglang.models.packed import Linear

ARCHITECTURE = "DFlashLagunaForCausalLM"
_GATES = {
    True: "head",
    "per-head": "head",
    "per-element": "element",
    False: None,
    None: None,
    "disabled": None,
}


@dataclass(frozen=True, slots=True)
class LagunaConfig(DFlashConfig):
    """gate: on what was attended, one for each head ("head") or each of its dimensions ("element"), or None."""

    gate: str | None = "head"


def read_laguna(path: Path, config: Mapping[str, Any]) -> LagunaConfig:
    """From `config.json`. Raises CheckpointError naming the field that does not fit."""
    gating = config.get("gating", True)
    if not isinstance(gating, bool | str | None) or gating not in _GATES:
        raise CheckpointError(
            f"{path}/config.json: gating {gating!r} is not one of {', '.join(map(repr, _GATES))}"
        )
    return parse(path, config, LagunaConfig, gate=_GATES[gating])


class _GatedAttention(Attention):
    def __init__(self, config: LagunaConfig) -> None:
        size, shape = config.hidden_size, config.attention
        super().__init__(
            size,
            size,
            shape,
            head_norm_eps=config.rms_norm_eps,
            bias=config.attention_bias,
            norm=norm_of(config),
        )
        width = shape.heads if config.gate == "head" else self.query_size
        self.gate = None if config.gate is None else Linear(size, width, bias=False)

    def mixed(self, attended: Tensor, x: Tensor) -> Tensor:
        """`attended` [T, Hq, D] times the gates of `x` [T, width], as [T, Hq · D]."""
        if self.gate is not None:
            gates = F.softplus(self.gate(x).float()).to(attended.dtype)
            attended = attended * gates.view(len(x), self.shape.heads, -1)
        return super().mixed(attended, x)


class _Layer(DFlashLayer):
    @staticmethod
    def _attention(config: DFlashConfig) -> Attention:
        assert isinstance(config, LagunaConfig)
        return _GatedAttention(config)

    def fill(self, reader: WeightReader, prefix: str) -> None:
        """From the checkpoint's tensors; raises `CheckpointError` naming what is missing or does not fit."""
        super().fill(reader, prefix)
        gate = getattr(self.attention, "gate", None)
        if gate is not None:
            reader.fill(gate.weight, f"{prefix}self_attn.g_proj.weight")


class LagunaDrafter(DFlashDrafter):
    """A DFlash drafter whose context K and V are no single product, so that its catch-up runs layer by layer."""

    layer = _Layer
    shared_context = False

    def __init__(self, config: LagunaConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Untrained."""
        super().__init__(config, target_embedding, target_lm_head)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.feature_norms = nn.ModuleList(RMSNorm(size, eps) for _ in range(config.num_features))

    def fill(self, reader: WeightReader) -> None:
        """From the checkpoint's tensors; raises `CheckpointError` naming what is missing or does not fit."""
        super().fill(reader)
        norms: list[Any] = list(self.feature_norms)
        for index, norm in enumerate(norms):
            reader.fill(norm.weight, f"aux_hidden_norms.{index}.weight")

    def fuse(self, features: Tensor) -> Tensor:
        """`features` [T, features · H] → the context feature [T, H]."""
        chunks = features.chunk(len(self.feature_norms), dim=-1)
        normed = [norm(chunk) for norm, chunk in zip(self.feature_norms, chunks, strict=True)]
        return super().fuse(torch.cat(normed, dim=-1))

    def keys_values(self, fused: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As `DFlashDrafter.keys_values`, every layer from its own norm of `fused`."""
        angles = self.rotary.angles(positions)
        layers: list[Any] = list(self.layers)
        pairs = [layer.attention.keys_values(layer.input_norm(fused), angles) for layer in layers]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


FORMAT = DraftFormat(
    name="Laguna's DFlash",
    arm=arms.DIFFUSION,
    keys=(ARCHITECTURE,),
    layers_key="target_layer_ids",
    read=read_laguna,
    model=LagunaDrafter,
    published="poolside",
    defined_by="SGLang's `dflash.py`",
)
