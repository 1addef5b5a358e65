"""Layers that both drafters share: attention whose context and cache belong to the caller, norm, MLP."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whiflash_kernels.layers import add_rms_norm, rms_norm, silu_and_mul

from whiflash_sglang.models.packed import Linear
from whiflash_sglang.models.rope import Angles, rotate, rotate_both, rotates_at_once

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
    """x / rms(x) · weight, in fp32 inside, in `x`'s dtype outside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return rms_norm(x, self.weight, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of two [T, size], which are given up, and its norm."""
        return add_rms_norm(residual, x, self.weight, self.eps)

    def scale(self) -> Tensor:
        """[size], what the normed input is multiplied by."""
        return self.weight


class GemmaRMSNorm(RMSNorm):
    """x / rms(x) · (1 + weight), multiplied in fp32: near one, bf16 would lose the weight's digits."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return rms_norm(x, self.weight, self.eps, unit_offset=True)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of two [T, size], which are given up, and its norm."""
        return add_rms_norm(residual, x, self.weight, self.eps, unit_offset=True)

    def scale(self) -> Tensor:
        """[size] fp32, what the normed input is multiplied by."""
        return 1.0 + self.weight.float()


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
        """`width` is the input's size (2H in EAGLE-3's first layer), `hidden` the output's. `bias`: of all four
        projections; `out_bias`: of the last, where it differs. `norm`: of the heads.
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
        """`x` [T, width] → [T, hidden]."""
        heads, kv_heads, head_dim = self.shape
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rotate_both(self.q_norm(q), self.k_norm(k), angles)
        elif rotates_at_once(q, angles):
            q, k = rotate_both(q, k, angles)
        else:
            q, k = torch.split(rotate(qkv[:, : heads + kv_heads], angles), [heads, kv_heads], dim=1)
        mixed: Tensor = self.out(self.mixed(attend(layer, q, k, v), x))
        return mixed

    def mixed(self, attended: Tensor, x: Tensor) -> Tensor:
        """What `out` reads: `attended` [T, Hq, D] as it is, [T, Hq · D]; `x` [T, width] is for gated kinds."""
        return attended.reshape(len(x), self.query_size)

    def keys_values(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """`x` [T, width] → k and v, each [T, Hkv, D]; neither queries nor attention are computed."""
        bias = None if self.qkv.bias is None else self.qkv.bias[self.query_size :]
        kv = F.linear(x, self.qkv.weight[self.query_size :], bias).view(len(x), 2 * self.shape.kv_heads, -1)
        k, v = kv.chunk(2, dim=1)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return rotate(k, angles), v


class Clamped(NamedTuple):
    """gpt-oss's activation: gate · sigmoid(alpha · gate) · (up + 1), the gate cut above and `up` at ± `limit`."""

    alpha: float
    limit: float


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up in one projection; with `clamped`, gpt-oss's form of it."""

    def __init__(self, hidden: int, intermediate: int, clamped: Clamped | None = None) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * intermediate, bias=False)
        self.down = Linear(intermediate, hidden, bias=False)
        self.clamped = clamped

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]."""
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
