"""Rotary position embedding from a Hugging Face configuration, NeoX (half-split) layout."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration's rotary settings in one dictionary, whichever of the two spellings it uses.

    transformers ≥ 5 writes `rope_parameters`; older files write `rope_theta` and `rope_scaling`.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.setdefault("rope_theta", float(config.get("rope_theta", 10000.0)))
    return parameters


class Rotary(nn.Module):
    """Rotates queries and keys; frequencies by transformers' `ROPE_INIT_FUNCTIONS`, angles in fp32.

    Raises `ValueError` for a rope type that transformers does not know.
    """

    inverse_frequencies: Tensor

    def __init__(self, config: dict[str, Any], head_dim: int) -> None:
        super().__init__()
        parameters = rope_parameters(config)
        kind = parameters["rope_type"]
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            frequencies, self.scale = 1.0 / parameters["rope_theta"] ** exponents, 1.0
        elif kind in ROPE_INIT_FUNCTIONS:
            shim = PretrainedConfig(
                hidden_size=config["hidden_size"],
                num_attention_heads=config["num_attention_heads"],
                head_dim=head_dim,
                max_position_embeddings=config.get("max_position_embeddings", 32768),
                rope_parameters=parameters,
            )
            frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](shim, torch.device("cpu"))
        else:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise ValueError(f"rope_type {kind!r} is unknown; transformers knows {known}")
        self.register_buffer("inverse_frequencies", frequencies.float(), persistent=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions` [T] int → cosines and sines, each [T, 1, head_dim // 2] fp32."""
        angles = positions.to(torch.float32)[:, None, None] * self.inverse_frequencies
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `x` [T, heads, head_dim] by `angles` of its rows; computed in fp32, returned in `x`'s dtype."""
    cosine, sine = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
