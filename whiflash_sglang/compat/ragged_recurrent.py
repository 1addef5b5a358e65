"""SGLang's backends of recurrent layers, for verifications whose requests have different widths.

Upstream views a verification as a block of one width for each request. Its kernel of the gated delta rule takes any
(`cu_seqlens`); what does not are the convolution before it and LFM2's (:func:`packed_verification` in place of both).
Nothing is read on the host, so a captured verification is what an eager one is. No GPU has run it: the kernel was run
under Triton's interpreter (`tests/compat/interpreted_recurrent.py`), and replays of all but it on a tape
(`tests/graphs/test_recurrent_graphs.py`).
"""

from functools import partial
from typing import Any

import torch
from sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent import (
    fused_sigmoid_gating_delta_rule_update,
)
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase
from sglang.srt.layers.attention.linear import gdn_backend, short_conv_backend
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend
from sglang.srt.layers.attention.linear.short_conv_backend import ShortConvAttnBackend

from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.patching import replace
from whiflash_sglang.platform.recurrent_ops import Rows, activated, packed_verification


def install() -> None:
    """Let the target's attention be made with these in a server of ours. Idempotent."""
    replace(gdn_backend, "GDNAttnBackend", partial(_chosen, RaggedDeltaBackend))
    replace(short_conv_backend, "ShortConvAttnBackend", partial(_chosen, RaggedConvBackend))


def _chosen(ours: Any, upstreams: Any) -> Any:
    return lambda runner: (ours if serves_ours() else upstreams)(runner)


class _Ragged(MambaAttnBackendBase):  # type: ignore[misc]
    supports_ragged_verify_graph = True

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what the plans of captured verifications are written to. Upstream's wants as many rows of each
        request, for trees of drafts alone."""
        super().init_cuda_graph_state(max_bs, max_bs)


class RaggedConvBackend(_Ragged, ShortConvAttnBackend):  # type: ignore[misc]
    """`ShortConvAttnBackend`: what it hands to the model's convolutions is right for every width."""


class RaggedDelta(_Ragged):
    """Packed verifications for a backend of the gated delta rule, whose other forwards are its own."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        # Where each slot of a graph keeps the states behind its rows; slots beyond the requests share one place.
        known, spare = self.verify_intermediate_state_indices, self.req_to_token_pool.size
        more = known.new_full((max(max_bs - len(known), 0),), spare)
        self.verify_intermediate_state_indices: torch.Tensor = torch.cat([known, more])

    def forward_extend(self, layer: Any, forward_batch: Any, **inputs: Any) -> torch.Tensor:
        if not forward_batch.forward_mode.is_target_verify():
            found: torch.Tensor = super().forward_extend(layer=layer, forward_batch=forward_batch, **inputs)
            return found
        return self._verify(layer, inputs["mixed_qkv"], inputs["a"], inputs["b"])

    def _verify(self, layer: Any, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """mixed_qkv: [T, 2 Hk K + H V]; a, b: [T, H]. Returns [1, T, H, V], zeros where a row is nobody's."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        starts, slots = self.forward_metadata.query_start_loc, self.forward_metadata.mamba_cache_indices
        rows = Rows.of(starts.long(), len(mixed_qkv))
        mixed = packed_verification(mixed_qkv, layer.conv_weights, layer.bias, cache, slots, rows)
        q, k, v = activated(mixed, layer.activation).split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
        out = fused_sigmoid_gating_delta_rule_update(
            A_log=layer.A_log,
            a=a,
            dt_bias=layer.dt_bias,
            softplus_beta=1.0,
            softplus_threshold=20.0,
            q=q.unflatten(-1, (-1, layer.head_q_dim))[None],
            k=k.unflatten(-1, (-1, layer.head_k_dim))[None],
            v=v.unflatten(-1, (-1, layer.head_v_dim))[None],
            b=b,
            initial_state_source=cache.temporal,
            initial_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=starts,
            disable_state_update=True,
            intermediate_states_buffer=cache.intermediate_ssm,
            intermediate_state_indices=self.verify_intermediate_state_indices,
        )
        # The kernel writes no row beyond the last request's, and what comes after reads all of them.
        return out.where(rows.covered[:, None, None], 0.0)


class RaggedDeltaBackend(RaggedDelta, GDNAttnBackend):  # type: ignore[misc]
    """`GDNAttnBackend`, with the rows of a verification packed."""
