"""Rotary position embedding from a Hugging Face configuration, NeoX (half-split) layout."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from whiflash_sglang.errors import CheckpointError

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, each [T, 1, head_dim // 2] fp32."""


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's rotary settings in one dictionary, whichever of the two spellings it uses.

    transformers ≥ 5 writes `rope_parameters`; older files write `rope_theta` and `rope_scaling`.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.setdefault("rope_theta", float(config.get("rope_theta", 10000.0)))
    return parameters


class Rotary(nn.Module):
    """Angles of positions; frequencies by transformers' `ROPE_INIT_FUNCTIONS`, everything in fp32.

    Raises `CheckpointError` for a rope type that transformers does not know.
    """

    def __init__(self, parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> None:
        """`parameters` as `rope_parameters` returns them."""
        super().__init__()
        kind = parameters["rope_type"]
        self.scale = 1.0
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            self._frequencies = 1.0 / parameters["rope_theta"] ** exponents
        elif kind in ROPE_INIT_FUNCTIONS:
            config = PretrainedConfig(
                hidden_size=head_dim,
                num_attention_heads=1,
                head_dim=head_dim,
                max_position_embeddings=max_positions,
                rope_parameters=dict(parameters),
            )
            self._frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        else:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise CheckpointError(f"rope_type {kind!r} is unknown; transformers knows {known}")

    def angles(self, positions: Tensor) -> Angles:
        """`positions` [T] int → cosines and sines, each [T, 1, head_dim // 2] fp32."""
        # Held outside the module's buffers: `.to(bfloat16)` must not round the frequencies.
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions.to(torch.float32)[:, None, None] * self._frequencies
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate `x` [T, heads, head_dim] by `angles` of its rows; computed in fp32, returned in `x`'s dtype."""
    cosine, sine = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
