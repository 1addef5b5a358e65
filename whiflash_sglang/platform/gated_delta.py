"""SGLang's attention backends of layers with a gated delta rule (Qwen3-Next, Qwen3.5; Kimi Linear's by channel), on the
CPU, and what else their models launch Triton for.
"""

from typing import Any

import torch
import torch.nn.functional as F

from whiflash_sglang.models.recurrent import gated_delta_rule, transposed
from whiflash_sglang.platform.recurrent_backend import CpuRecurrentBackend


class CpuDeltaBackend(CpuRecurrentBackend):
    """It stands in for `GDNAttnBackend`."""

    def forward_decode(self, layer: Any, forward_batch: Any, **inputs: Any) -> torch.Tensor:
        return self._run(layer, forward_batch, **inputs)

    def forward_extend(self, layer: Any, forward_batch: Any, **inputs: Any) -> torch.Tensor:
        return self._run(layer, forward_batch, **inputs)

    def _run(
        self,
        layer: Any,
        forward_batch: Any,
        *,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """mixed_qkv: [T, 2 Hk K + H V]; a: as of `decay`; b: [T, H] or [1, T, H]. Returns [1, T, H, V]."""

        def rule(mixed: torch.Tensor, states: torch.Tensor, **rows: Any) -> Any:
            q, k, v = mixed.split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
            return gated_delta_rule(
                q.unflatten(-1, (-1, layer.head_q_dim)),
                k.unflatten(-1, (-1, layer.head_k_dim)),
                v.unflatten(-1, (-1, layer.head_v_dim)),
                self.decay(layer, a),
                b.flatten(0, -2).float().sigmoid(),
                states,
                **rows,
            )

        convolution = (layer.conv_weights, layer.bias, layer.activation)
        return self.go_on(layer.layer_id, forward_batch, mixed_qkv, convolution, rule)[None]

    def decay(self, layer: Any, a: torch.Tensor) -> torch.Tensor:
        """What a row leaves of the state, as a logarithm. a: [T, H], as it was projected. Returns [T, H] fp32."""
        return -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())


class CpuChannelDeltaBackend(CpuDeltaBackend):
    """It stands in for `KDAAttnBackend` (Kimi Delta Attention): the decay is each key channel's own."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        *_, taps, width = self.conv_states_shape
        self.conv_states_shape = (*_, width, taps)

    def cache_of(self, layer_id: int) -> Any:
        return transposed(super().cache_of(layer_id))

    def decay(self, layer: Any, a: torch.Tensor) -> torch.Tensor:
        """a: [T, H K] or [1, T, H, K]. Returns [T, H, K] fp32, all above the layer's lower bound if it has one."""
        heads, width = layer.num_v_heads, layer.head_k_dim
        rate = layer.A_log.float().exp().view(heads, 1)
        gate = a.reshape(-1, heads, width).float() + layer.dt_bias.float().view(heads, width)
        if layer.lower_bound is not None:
            return layer.lower_bound * (rate * gate).sigmoid()
        return -rate * F.softplus(gate)


def fused_qkvzba_split_reshape_cat(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take apart what Qwen3-Next projects at once; its columns lie by key head.

    Args:
        mixed_qkvz: [T, Hk (2 K + 2 V H / Hk)]. mixed_ba: [T, 2 H].

    Returns:
        [T, 2 Hk K + H V] of queries, keys and values, z [T, H, V], b [T, H] and a [T, H].
    """
    rows, per_key = len(mixed_qkvz), num_heads_v // num_heads_qk
    sizes = [head_qk, head_qk, per_key * head_v, per_key * head_v]
    q, k, v, z = mixed_qkvz.view(rows, num_heads_qk, sum(sizes)).split(sizes, -1)
    b, a = mixed_ba.view(rows, num_heads_qk, 2 * per_key).chunk(2, -1)
    mixed = torch.cat([x.reshape(rows, -1) for x in (q, k, v)], -1)
    return mixed, z.reshape(rows, -1, head_v), b.reshape(rows, -1), a.reshape(rows, -1)


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of Qwen3.5, whose columns are all queries, keys, values and z, and all b and a."""
    rows, width = len(mixed_qkvz), 2 * num_heads_qk * head_qk + num_heads_v * head_v
    mixed, z = mixed_qkvz[:, :width], mixed_qkvz[:, width:]
    b, a = mixed_ba.chunk(2, -1)
    return mixed.contiguous(), z.reshape(rows, num_heads_v, head_v), b.contiguous(), a.contiguous()


def fused_sigmoid_mul(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """``attn_output · sigmoid(gate)``. attn_output: [T, H D] (mutable with `inplace`). gate: the same or [T, H, D]."""
    if quant:
        raise ValueError("gates on the CPU are not quantised")
    gated = (attn_output.float() * gate.reshape(attn_output.shape).float().sigmoid()).to(attn_output.dtype)
    return attn_output.copy_(gated) if inplace else gated


def gated_norm(
    self: Any,
    x: torch.Tensor,
    g: torch.Tensor,
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> torch.Tensor:
    """``x / rms(x) · weight · act(g)``, in place of SGLang's `FusedRMSNormGated.forward`. x, g: [N, V]."""
    if residual is not None or prenorm:
        raise ValueError("the gated norm on the CPU takes no residual")
    return _gated(x, g, self)


def norm_gated(self: Any, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """The same, in place of the forward of the `RMSNorm` that Qwen3.5 has. x, z: [N, V]."""
    if self.group_size is not None or not self.norm_before_gate or z is None:
        raise ValueError("the gated norm on the CPU takes whole rows, and gates behind it")
    return _gated(x, z, self)


def _gated(x: torch.Tensor, gate: torch.Tensor, norm: Any) -> torch.Tensor:
    weight = None if norm.weight is None else norm.weight.float()
    h, g = F.rms_norm(x.float(), x.shape[-1:], weight, norm.eps), gate.float()
    return (h * (g.sigmoid() if norm.activation == "sigmoid" else F.silu(g))).to(x.dtype)
