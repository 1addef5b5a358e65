"""Layers that all drafters share: attention whose context and cache belong to the caller, norm, MLP, rotary positions.

Rotary settings have Hugging Face's form, and the layout is NeoX's (half-split). Checkpoints that rotate neighbouring
pairs instead are permuted when they are loaded (`half_split`).
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from whiflash_kernels import packed
from whiflash_kernels.layers import add_rms_norm, rms_norm, rotate_in_place, rotates_fused, silu_and_mul

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.packed import Linear


class Angles(NamedTuple):
    """Rotary angles of T rows. R <= head_dim is the rotary width; a head's other dimensions stay unrotated.

    table: [N, R] fp32, cosines in the first half of a row, sines in the second. rows: [T] int64, each row's index in
    `table`; None: 0 … T-1.
    """

    table: Tensor
    rows: Tensor | None = None

    def halves(self) -> tuple[Tensor, Tensor]:
        """Return the rows' cosines and sines, [T, 1, R // 2] each."""
        table = self.table if self.rows is None else self.table[self.rows]
        cosine, sine = table[:, None].chunk(2, dim=-1)
        return cosine, sine


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's rotary settings in one dictionary, from either of the two spellings.

    transformers ≥ 5 writes `rope_parameters`; older files write `rope_theta` and `rope_scaling`. If only a part of a
    head is rotated, `rope_dim` says how many of its dimensions, or `partial_rotary_factor` which share.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.setdefault("rope_theta", float(config.get("rope_theta", 10000.0)))
    # Some drafters copied these keys from targets with positions in three dimensions; text has one dimension.
    for key in ("mrope_section", "mrope_interleaved"):
        parameters.pop(key, None)
    if parameters["rope_type"] == "mrope":
        parameters["rope_type"] = "default"
    factor = parameters.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if "rope_dim" not in parameters and factor not in (None, 1, 1.0):
        parameters["partial_rotary_factor"] = factor
    return parameters


def rotary_width(parameters: Mapping[str, Any], head_dim: int) -> int:
    """Return how many of a head's first dimensions are rotated."""
    return int(parameters.get("rope_dim") or head_dim * parameters.get("partial_rotary_factor", 1.0))


def half_split(rows: Tensor, heads: int, width: int) -> Tensor:
    """Reorder rows [heads · D, …] of a projection (or a norm's [D]) in which neighbours 2i, 2i+1 rotate together, so
    that i and i + `width` / 2 do. Scores stay equal, since queries and keys are permuted in the same way.
    """
    size = len(rows) // heads
    order = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2), torch.arange(width, size)])
    return rows.view(heads, size, *rows.shape[1:])[:, order].flatten(0, 1)


class Rotary(nn.Module):
    """Computes the angles of positions in fp32, with frequencies by transformers' `ROPE_INIT_FUNCTIONS`.

    Raises `CheckpointError` for a rope type that transformers does not know, a rotary width that exceeds a head, or
    frequencies that are not finite numbers above 0.
    """

    def __init__(self, parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> None:
        """Compute the frequencies from `parameters`, the result of `rope_parameters`."""
        super().__init__()
        kind, width = parameters["rope_type"], rotary_width(parameters, head_dim)
        if not 2 <= width <= head_dim or width % 2:
            raise CheckpointError(
                f"{width:.6g} of a head's {head_dim} dimensions cannot be rotated (rope_dim, partial_rotary_factor)"
            )
        self.scale = 1.0
        if kind == "default":
            exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
            self._frequencies = 1.0 / parameters["rope_theta"] ** exponents
        elif kind in ROPE_INIT_FUNCTIONS:
            rest = {k: v for k, v in parameters.items() if k not in ("rope_dim", "partial_rotary_factor")}
            config = PretrainedConfig(
                hidden_size=width,
                num_attention_heads=1,
                head_dim=width,
                max_position_embeddings=max_positions,
                rope_parameters=rest,
            )
            self._frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        else:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise CheckpointError(f"rope_type {kind!r} is unknown; transformers knows {known}")
        found = self._frequencies
        if found.shape != (width // 2,) or not ((found > 0) & found.isfinite()).all() or not 0 < self.scale < 100:
            raise CheckpointError(
                f"rope_type {kind!r} gives {list(found.shape)} frequencies {found.tolist()!s:.100}, "
                f"scaled by {self.scale}; {width // 2} above 0 are needed (rope_theta, factors)"
            )
        self._table: Tensor | None = None

    def tabulate(self, positions: int, device: torch.device) -> Tensor:
        """Compute the angles of positions 0 … `positions` - 1 once; later calls of `angles` look them up.

        Returns `Angles.table`, [positions, R] fp32.
        """
        self._table = None
        self._table = self.angles(torch.arange(positions, device=device)).table
        return self._table

    def angles(self, positions: Tensor) -> Angles:
        """Return the angles of `positions` [T] int64. After `tabulate`, positions must be below the table's length."""
        if self._table is not None:
            return Angles(self._table, positions)
        # Not a buffer of the module, because `.to(bfloat16)` must not round the frequencies.
        self._frequencies = self._frequencies.to(positions.device)
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        table = torch.cat([angles.cos(), angles.sin()], dim=-1)
        rows = torch.arange(len(table), device=table.device) if table.is_cuda else None
        return Angles(table if self.scale == 1.0 else table * self.scale, rows)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate `x` [T, heads, head_dim] by `angles` of its rows; computed in fp32, returned in `x`'s dtype."""
    cosine, sine = angles.halves()
    width = 2 * cosine.shape[-1]
    first, second = x[..., :width].float().chunk(2, dim=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    if width < x.shape[-1]:
        turned.append(x[..., width:].float())
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotate_both(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys like `rotate`, possibly in place: nobody else may use the unrotated tensors."""
    if not rotates_fused(q, angles.table.shape[-1]):
        return rotate(q, angles), rotate(k, angles)
    rotate_in_place(q, k, angles.table, angles.rows)
    return q, k


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer, q [T,Hq,D], k [T,Hkv,D], v [T,Hkv,D]) -> [T,Hq,D]`.

The caller decides where k and v are stored and what every query sees (paged pools in the server, masked SDPA
in training); scores are scaled by `D ** -0.5`.
"""


class AttentionShape(NamedTuple):
    """Query heads, key/value heads and the size of one head."""

    heads: int
    kv_heads: int
    head_dim: int


class RMSNorm(nn.Module):
    """RMS norm, x / rms(x) · weight: computed in fp32, returned in `x`'s dtype."""

    unit_offset: ClassVar[bool] = False

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm `x`, [..., size] → [..., size]."""
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add `x` to `residual`, [T, size] each; returns the sum and its norm. Both inputs may be overwritten."""
        return add_rms_norm(residual, x, self.weight, self.eps, unit_offset=self.unit_offset)

    def scale(self) -> Tensor:
        """Return the factor of the normed input, [size]; for Gemma's norm 1 + weight in fp32."""
        return 1.0 + self.weight.float() if self.unit_offset else self.weight


class GemmaRMSNorm(RMSNorm):
    """Gemma's norm, x / rms(x) · (1 + weight), multiplied in fp32: near one, bf16 loses the weight's digits."""

    unit_offset = True


class Attention(nn.Module):
    """Grouped-query attention with one fused projection, and optional per-head query and key norms."""

    def __init__(
        self,
        width: int,
        hidden: int,
        shape: AttentionShape,
        *,
        head_norm_eps: float | None,
        bias: bool = False,
        out_bias: bool | None = None,
        norm: type[RMSNorm] = RMSNorm,
    ) -> None:
        """Make random weights. width: the input's size (2H in EAGLE-3's first layer). hidden: the output's size. bias:
        of all four projections; out_bias: of the last, if it differs. norm: class of the head norms.
        """
        super().__init__()
        self.shape = shape
        self.query_size = shape.heads * shape.head_dim
        self.qkv = Linear(width, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, bias=bias)
        self.out = Linear(self.query_size, hidden, bias=bias if out_bias is None else out_bias)
        self.q_norm = self.k_norm = None
        if head_norm_eps is not None:
            self.q_norm = norm(shape.head_dim, head_norm_eps)
            self.k_norm = norm(shape.head_dim, head_norm_eps)

    def forward(self, x: Tensor, angles: Angles, layer: int, attend: Attend) -> Tensor:
        """Attend from `x` [T, width] → [T, hidden]; `attend` stores k and v of `layer` and mixes the values."""
        heads, kv_heads, head_dim = self.shape
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_both(q, k, angles)
        mixed: Tensor = self.out(attend(layer, q, k, v).reshape(len(x), self.query_size))
        return mixed

    def keys_values(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Compute only k and v of `x` [T, width], each [T, Hkv, D], k normed and rotated."""
        own = slice(self.query_size, None)
        bias = None if self.qkv.bias is None else self.qkv.bias[own]
        kv = packed.linear(x, packed.rows(self.qkv.weight, own), bias)
        k, v = kv.view(len(x), 2 * self.shape.kv_heads, -1).chunk(2, dim=1)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return rotate(k, angles), v


class SwiGLU(nn.Module):
    """The MLP down(silu(gate(x)) · up(x)), gate and up in one projection.

    With `clamped` = (alpha, limit) gpt-oss's activation takes the place of silu(gate) · up: gate · sigmoid(alpha ·
    gate) · (up + 1), with gate at most `limit` and up within ± `limit`.
    """

    def __init__(self, hidden: int, intermediate: int, clamped: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * intermediate, bias=False)
        self.down = Linear(intermediate, hidden, bias=False)
        self.clamped = clamped

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to `x`, [T, hidden] → [T, hidden]."""
        gate_up = self.gate_up(x)
        if self.clamped is None:
            activated = silu_and_mul(gate_up)
        else:
            alpha, limit = self.clamped
            gate, up = gate_up.chunk(2, dim=-1)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
            activated = gate * torch.sigmoid(alpha * gate) * up
        mixed: Tensor = self.down(activated)
        return mixed
