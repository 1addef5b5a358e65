"""Attention backends for layers with a recurrent state, on the CPU: gated delta rules (Qwen3-Next, Qwen3.5; Kimi
Linear's with a decay per channel) and Mamba 2 (Nemotron-H).

They replace SGLang's backends, whose kernels are Triton's and whose verifications have one width: here rows are packed.
A verification reads the states and records the state after each of its rows; the commit then selects one
(:func:`whiflash_cpu.recurrent_ops.scatter_mamba_states_after_mtp_verify`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase

from whiflash_cpu.recurrent_ops import gated_delta_rule, selective_scan
from whiflash_sglang.engine.forward import recurrences
from whiflash_sglang.engine.forward.recurrences import Rows

Rule = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""The state update after the convolution. Its keywords and results are those of `recurrent_ops.recurrence`."""


class CpuRecurrentBackend(MambaAttnBackendBase):  # type: ignore[misc]
    """Run prefill, decoding and verification of layers with a convolution and a state matrix that a rule updates."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.conv_states_shape = model_runner.req_to_token_pool.mamba_pool.mamba_cache.conv[0].shape

    def cache_of(self, layer_id: int) -> Any:
        """Return SGLang's record of a layer's states: ``conv[0]`` [slots, D, K - 1], ``temporal`` [slots, H, X, Y]; for
        verifications ``intermediate_conv_window[0]`` and ``intermediate_ssm``, each [requests + 1, steps, …]."""
        return self.req_to_token_pool.mamba2_layer_cache(layer_id)

    def go_on(
        self,
        layer_id: int,
        forward_batch: Any,
        x: torch.Tensor,
        convolution: tuple[torch.Tensor, torch.Tensor | None, str | None],
        rule: Rule,
    ) -> torch.Tensor:
        """Convolve `x` [T, D] (weight, bias, activation), apply `rule` and store the states for the next forward.

        Returns the rule's outputs, [T, …].
        """
        metadata, mode, cache = self.forward_metadata, forward_batch.forward_mode, self.cache_of(layer_id)
        starts, slots = metadata.query_start_loc.long(), metadata.mamba_cache_indices.long()
        rows, verifies = Rows.of(starts, len(x)), mode.is_target_verify()
        states, (weight, bias, activation) = cache.temporal[slots], convolution
        if verifies:
            mixed = recurrences.packed_verification(x, weight, bias, cache, slots, rows)
        else:
            inputs = cache.conv[0][slots]
            if mode.is_extend():
                goes_on = forward_batch.extend_prefix_lens > 0
                inputs = inputs.to(x.dtype).where(goes_on[:, None, None], 0.0)
                states = states.where(goes_on[:, None, None, None], 0.0)
            mixed, behind = recurrences.packed_convolution(x, weight, bias, inputs, rows)
        marks = _marks(metadata, forward_batch)
        out, after, marked = rule(
            recurrences.activated(mixed, activation), states, starts=starts, rows=rows, every=verifies, marks=marks
        )
        if verifies:
            cache.intermediate_ssm[: after.shape[0], : after.shape[1]] = after.to(states.dtype)
        else:
            cache.conv[0][slots] = behind[starts[1:] - 1].to(cache.conv[0].dtype)
            cache.temporal[slots] = after.to(states.dtype)
        if marks is not None:
            kept = marks > 0
            beside = metadata.mamba_track_indices[kept]
            cache.conv[0][beside] = behind[(starts[:-1] + marks - 1)[kept]].to(cache.conv[0].dtype)
            cache.temporal[beside] = marked[kept].to(states.dtype)
        return out


def _marks(metadata: Any, forward_batch: Any) -> torch.Tensor | None:
    """Return [B] int64: the number of rows after which each request's state is also stored for the prefix cache, or 0.
    None if no request stores one here; in a verification the commit does that.
    """
    if not metadata.has_mamba_track_mask or forward_batch.forward_mode.is_target_verify():
        return None
    mask = forward_batch.mamba_track_mask
    if forward_batch.forward_mode.is_decode():
        return mask.long()
    return forward_batch.mamba_track_aligned_lens().long().where(mask, 0)


class CpuMamba2Backend(CpuRecurrentBackend):
    """Replaces `Mamba2AttnBackend`, and the forward of the `MambaMixer2` that it receives."""

    def forward(
        self,
        mixer: Any,
        hidden_states: torch.Tensor,
        output: torch.Tensor | None,
        layer_id: int,
        forward_batch: Any,
        mup_vector: torch.Tensor | None = None,
        use_triton_causal_conv: bool = False,
    ) -> torch.Tensor:
        """Run a Mamba 2 mixer; parameters and result are those of `mixer_forward`."""

        def scan(x: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
            time = F.softplus(dt.float() + mixer.dt_bias.float())

            def rule(mixed: torch.Tensor, states: torch.Tensor, **rows: Any) -> Any:
                h, b, c = recurrences.split_mixed(mixer, mixed)
                return selective_scan(h, time, mixer.A.float(), b, c, mixer.D, states, **rows)

            return self.go_on(layer_id, forward_batch, x, recurrences.convolution_of(mixer), rule)

        return recurrences.mixer_forward(scan, mixer, hidden_states, output, mup_vector)


class CpuDeltaBackend(CpuRecurrentBackend):
    """Replaces `GDNAttnBackend`, for layers with a gated delta rule whose decay is each head's own."""

    def forward_extend(
        self, layer: Any, forward_batch: Any, *, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Apply the gated delta rule. mixed_qkv: [T, 2 Hk K + H V]. a: see `decay`. b: [T, H] or [1, T, H]. Returns
        [1, T, H, V]."""

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

    forward_decode = forward_extend

    def decay(self, layer: Any, a: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of each row's state decay, [T, H] fp32. a: [T, H], the layer's projection."""
        return -layer.A_log.float().exp() * F.softplus(a.float() + layer.dt_bias.float())


class CpuChannelDeltaBackend(CpuDeltaBackend):
    """Replaces `KDAAttnBackend` (Kimi Delta Attention): the decay is each key channel's own."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        *_, taps, width = self.conv_states_shape
        self.conv_states_shape = (*_, width, taps)

    def cache_of(self, layer_id: int) -> Any:
        return recurrences.transposed(super().cache_of(layer_id))

    def decay(self, layer: Any, a: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of each channel's decay, [T, H, K] fp32, above the layer's lower bound if it has one.
        a: [T, H K] or [1, T, H, K], the projection of the layer's input."""
        heads, width = layer.num_v_heads, layer.head_k_dim
        rate = layer.A_log.float().exp().view(heads, 1)
        gate = a.reshape(-1, heads, width).float() + layer.dt_bias.float().view(heads, width)
        if layer.lower_bound is not None:
            return layer.lower_bound * (rate * gate).sigmoid()
        return -rate * F.softplus(gate)


def fused_qkvzba_split_reshape_cat(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fused projection of Qwen3-Next, whose columns are ordered by key head. mixed_qkvz:
    [T, Hk (2 K + 2 V H / Hk)]. mixed_ba: [T, 2 H]. Returns [T, 2 Hk K + H V] of queries, keys and values, z [T, H, V],
    b [T, H] and a [T, H]."""
    rows, per_key = len(mixed_qkvz), num_heads_v // num_heads_qk
    sizes = [head_qk, head_qk, per_key * head_v, per_key * head_v]
    q, k, v, z = mixed_qkvz.view(rows, num_heads_qk, sum(sizes)).split(sizes, -1)
    b, a = mixed_ba.view(rows, num_heads_qk, 2 * per_key).chunk(2, -1)
    mixed = torch.cat([x.reshape(rows, -1) for x in (q, k, v)], -1)
    return mixed, z.reshape(rows, -1, head_v), b.reshape(rows, -1), a.reshape(rows, -1)


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split Qwen3.5's fused projection as `fused_qkvzba_split_reshape_cat`; its columns are not grouped by key head."""
    rows, width = len(mixed_qkvz), 2 * num_heads_qk * head_qk + num_heads_v * head_v
    mixed, z = mixed_qkvz[:, :width], mixed_qkvz[:, width:]
    b, a = mixed_ba.chunk(2, -1)
    return mixed.contiguous(), z.reshape(rows, num_heads_v, head_v), b.contiguous(), a.contiguous()


def fused_sigmoid_mul(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """Return ``attn_output · sigmoid(gate)``. attn_output: [T, H D], mutable if `inplace`. gate: also [T, H, D]."""
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
    """Return ``x / rms(x) · weight · act(g)``; replaces SGLang's `FusedRMSNormGated.forward`. x, g: [N, V]."""
    if residual is not None or prenorm:
        raise ValueError("the gated norm on the CPU takes no residual")
    return _gated(x, g, self)


def norm_gated(self: Any, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x / rms(x) · weight · act(z)``; replaces the forward of Qwen3.5's gated `RMSNorm`. x, z: [N, V]."""
    if self.group_size is not None or not self.norm_before_gate or z is None:
        raise ValueError("the gated norm on the CPU takes whole rows, and gates behind it")
    return _gated(x, z, self)


def _gated(x: torch.Tensor, gate: torch.Tensor, norm: Any) -> torch.Tensor:
    weight = None if norm.weight is None else norm.weight.float()
    h, g = F.rms_norm(x.float(), x.shape[-1:], weight, norm.eps), gate.float()
    return (h * (g.sigmoid() if norm.activation == "sigmoid" else F.silu(g))).to(x.dtype)
