"""Rotary position embedding from a Hugging Face configuration, NeoX (half-split) layout.

Checkpoints that rotate neighbouring pairs instead are permuted when they are loaded (`half_split`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from whiflash_kernels.layers import rotate_in_place, rotates_fused

from whiflash_sglang.errors import CheckpointError


class Angles(NamedTuple):
    """Cosines and sines of T rows; R <= head_dim is the rotary width, the rest passes through.

    cosine, sine: [T, 1, R // 2] fp32, the halves of `table` [T, R], which one kernel reads for all layers. rows: [T]
    int64, 0 … T-1, where `table` is on CUDA; None elsewhere.
    """

    cosine: Tensor
    sine: Tensor
    table: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, table: Tensor) -> "Angles":
        cosine, sine = table[:, None].chunk(2, dim=-1)
        return cls(
            cosine, sine, table, torch.arange(len(table), device=table.device) if table.is_cuda else None
        )

    def repeated(self, times: int) -> "Angles":
        """For so many times the same rows."""
        return Angles.of(self.table.repeat(times, 1))


_OF_THE_TARGET = ("mrope_section", "mrope_interleaved")
"""Copied from targets that count positions in three dimensions; a drafter of text has one."""


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's rotary settings in one dictionary, whichever of the two spellings it uses.

    transformers ≥ 5 writes `rope_parameters`; older files write `rope_theta` and `rope_scaling`. Where only a part
    of a head is rotated, `rope_dim` says how many of its dimensions, or `partial_rotary_factor` which share.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.pop("type", "default")
    parameters.setdefault("rope_type", kind)
    parameters.setdefault("rope_theta", float(config.get("rope_theta", 10000.0)))
    for key in _OF_THE_TARGET:
        parameters.pop(key, None)
    if parameters["rope_type"] == "mrope":
        parameters["rope_type"] = "default"
    factor = parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if "rope_dim" not in parameters and factor not in (None, 1, 1.0):
        parameters["partial_rotary_factor"] = factor
    return parameters


def rotary_width(parameters: Mapping[str, Any], head_dim: int) -> int:
    """How many of a head's first dimensions are rotated."""
    return int(parameters.get("rope_dim") or head_dim * parameters.get("partial_rotary_factor", 1.0))


def half_split(rows: Tensor, heads: int, width: int) -> Tensor:
    """Rows [heads · D, …] of a projection (or a norm's [D], one head) whose neighbours 2i, 2i+1 rotate together,
    reordered so that i and i + `width` / 2 do. Scores stay: queries and keys are permuted alike.
    """
    size = len(rows) // heads
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2), torch.arange(width, size)])
    return rows.view(heads, size, *rows.shape[1:])[:, order].flatten(0, 1)


class Rotary(nn.Module):
    """Angles of positions; frequencies by transformers' `ROPE_INIT_FUNCTIONS`, everything in fp32.

    Raises `CheckpointError` for a rope type that transformers does not know, or a rotary width that a head has not.
    """

    def __init__(self, parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> None:
        """`parameters` as `rope_parameters` returns them."""
        super().__init__()
        kind, width = parameters["rope_type"], rotary_width(parameters, head_dim)
        if not 2 <= width <= head_dim or width % 2:
            raise CheckpointError(
                f"{width} of a head's {head_dim} dimensions cannot be rotated (rope_dim, partial_rotary_factor)"
            )
        self.scale = 1.0
        if kind == "default":
            exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
            self._frequencies = 1.0 / parameters["rope_theta"] ** exponents
        elif kind in ROPE_INIT_FUNCTIONS:
            whole = {
                key: value
                for key, value in parameters.items()
                if key not in ("rope_dim", "partial_rotary_factor")
            }
            config = PretrainedConfig(
                hidden_size=width,
                num_attention_heads=1,
                head_dim=width,
                max_position_embeddings=max_positions,
                rope_parameters=whole,
            )
            self._frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        else:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise CheckpointError(f"rope_type {kind!r} is unknown; transformers knows {known}")

    def angles(self, positions: Tensor) -> Angles:
        """Of `positions` [T] int."""
        # Held outside the module's buffers: `.to(bfloat16)` must not round the frequencies.
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        table = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return Angles.of(table if self.scale == 1.0 else table * self.scale)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate `x` [T, heads, head_dim] by `angles` of its rows; computed in fp32, returned in `x`'s dtype."""
    cosine, sine = angles.cosine, angles.sine
    width = 2 * cosine.shape[-1]
    first, second = x[..., :width].float().chunk(2, dim=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    if width < x.shape[-1]:
        turned.append(x[..., width:].float())
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotates_at_once(q: Tensor, angles: Angles) -> bool:
    """Whether one kernel rotates queries [T, heads, head_dim] with their keys where they are."""
    return rotates_fused(q, angles.table.shape[-1])


def rotate_both(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys, which nobody else may need unrotated: it may write to them."""
    if angles.rows is None or not rotates_at_once(q, angles):
        return rotate(q, angles), rotate(k, angles)
    rotate_in_place(q, k, angles.table, angles.rows)
    return q, k
