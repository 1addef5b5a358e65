"""Extend SGLang's backends of recurrent layers to verifications whose requests have different widths.

Upstream lays a verification out as a block of one width for each request. Its kernel of the gated delta rule, KDA's
too, takes any widths (`cu_seqlens`). The convolutions before it and LFM2's do not, so :func:`packed_verification`
replaces them all; nor does Mamba 2's kernel, for which rows are laid out here with the largest width for each request.

Nothing is read on the host, so a captured verification is what an eager one is. No GPU has run it: the kernels were run
under Triton's interpreter (`tests/compat/interpreted_recurrent.py`), and replays of all but them on a tape
(`tests/graphs/test_recurrent_graphs.py`).
"""

from functools import partial
from typing import Any

import torch
from sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent import fused_sigmoid_gating_delta_rule_update
from sglang.kernels.ops.mamba.triton_ops.mamba_ssm import selective_state_update
from sglang.srt.layers.attention.hybrid_linear_attn_backend import Mamba2AttnBackend, MambaAttnBackendBase
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend
from sglang.srt.layers.attention.linear.kda_backend import KDAAttnBackend
from sglang.srt.layers.attention.linear.short_conv_backend import ShortConvAttnBackend

from whiflash_sglang.engine.carried import serves_ours
from whiflash_sglang.engine.forward import recurrences
from whiflash_sglang.engine.forward.recurrences import Rows
from whiflash_sglang.engine.patching import around


@around(
    "sglang.srt.layers.attention.hybrid_linear_attn_backend:MambaAttnBackendBase.__new__",
    why="SGLang's recurrent layers verify blocks of one width, and their backends are in no registry",
    until="they read a ragged layout",
    makes=True,
)
def _chosen(original: Any) -> Any:
    """Give recurrent layers our backends. Upstream's names stay classes, since SGLang uses them in `isinstance`."""

    def new(kind: Any, *_: Any, **__: Any) -> Any:
        return object.__new__(OURS.get(kind, kind) if serves_ours() else kind)

    return staticmethod(new)


class _Ragged(MambaAttnBackendBase):  # type: ignore[misc]
    supports_ragged_verify_graph = True

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate buffers for the plans of captured verifications. Upstream requires equally many rows of each
        request, which only trees of drafts need."""
        super().init_cuda_graph_state(max_bs, max_bs)


class RaggedConvBackend(_Ragged, ShortConvAttnBackend):  # type: ignore[misc]
    """`ShortConvAttnBackend`, whose inputs to the model's convolutions are right for every width."""


class RaggedDelta(_Ragged):
    """Adds packed verifications to a backend of the gated delta rule, whose other forwards stay its own.

    by_channel: the decay is each key channel's own, and the convolution's inputs are transposed (KDA).
    """

    by_channel = False

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        # Places of the states after each slot's rows; a graph's slots beyond the requests share one.
        known, spare = self.verify_intermediate_state_indices, self.req_to_token_pool.size
        more = known.new_full((max(max_bs - len(known), 0),), spare)
        self.verify_intermediate_state_indices: torch.Tensor = torch.cat([known, more])

    def forward_extend(self, layer: Any, forward_batch: Any, **inputs: Any) -> torch.Tensor:
        if not forward_batch.forward_mode.is_target_verify():
            found: torch.Tensor = super().forward_extend(layer=layer, forward_batch=forward_batch, **inputs)
            return found
        return self._verify(layer, inputs["mixed_qkv"], inputs["a"], inputs["b"])

    def _verify(self, layer: Any, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Verify packed rows in a layer. mixed_qkv: [T, 2 Hk K + H V]; a: [T, H], or [T, H K] by channel; b: [T, H] or
        [1, T, H]. Returns [1, T, H, V], zeros for rows of no request."""
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        starts, slots = self.forward_metadata.query_start_loc, self.forward_metadata.mamba_cache_indices
        rows = Rows.of(starts.long(), len(mixed_qkv))
        inputs = recurrences.transposed(cache) if self.by_channel else cache
        mixed = recurrences.packed_verification(mixed_qkv, layer.conv_weights, layer.bias, inputs, slots, rows)
        q, k, v = recurrences.activated(mixed, layer.activation).split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
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
            is_kda=self.by_channel,
            lower_bound=layer.lower_bound,
            disable_state_update=True,
            intermediate_states_buffer=cache.intermediate_ssm,
            intermediate_state_indices=self.verify_intermediate_state_indices,
        )
        # The kernel writes no row beyond the last request's, and what comes after reads all of them.
        return out.where(rows.covered[:, None, None], 0.0)


class RaggedDeltaBackend(RaggedDelta, GDNAttnBackend):  # type: ignore[misc]
    """`GDNAttnBackend`, with the rows of a verification packed."""


class RaggedChannelDeltaBackend(RaggedDelta, KDAAttnBackend):  # type: ignore[misc]
    """`KDAAttnBackend`, with the rows of a verification packed."""

    by_channel = True

    @staticmethod
    def _can_fuse_accept_state(verify_backend: Any) -> bool:
        """Return False: here every state is committed. FlashInfer's kernel would read the accepted state where its own
        verification left it."""
        return False


class RaggedMamba2(_Ragged):
    """Adds packed verifications to a backend of Mamba 2, whose other forwards stay its own."""

    def forward(
        self,
        mixer: Any,
        hidden_states: torch.Tensor,
        output: torch.Tensor | None,
        layer_id: int,
        forward_batch: Any,
        mup_vector: torch.Tensor | None = None,
        **named: Any,
    ) -> torch.Tensor:
        """Run a layer; verifications run by `mixer_forward`, whose arguments and result these are."""
        if not forward_batch.forward_mode.is_target_verify():
            found: torch.Tensor = super().forward(
                mixer, hidden_states, output, layer_id, forward_batch, mup_vector=mup_vector, **named
            )
            return found
        cache = self.req_to_token_pool.mamba2_layer_cache(layer_id)
        return recurrences.mixer_forward(partial(self._verify, mixer, cache), mixer, hidden_states, output, mup_vector)

    def _verify(self, mixer: Any, cache: Any, x: torch.Tensor, dt: torch.Tensor) -> torch.Tensor:
        """Verify packed rows in a layer. x: [T, D]; dt: [T, H]. Returns [T, H, P], zeros for rows of no request."""
        starts, slots = self.forward_metadata.query_start_loc, self.forward_metadata.mamba_cache_indices
        rows, (weight, bias, activation) = Rows.of(starts.long(), len(x)), recurrences.convolution_of(mixer)
        mixed = recurrences.activated(recurrences.packed_verification(x, weight, bias, cache, slots, rows), activation)
        # Row i of request r is at [r, i]; rows of no request share one row after all others.
        most = min(len(x), cache.intermediate_ssm.shape[1])
        nobodys = len(slots) * most
        live = rows.covered & (slots[rows.owner] > 0)
        place = (rows.owner * most + rows.step).where(live, nobodys)
        laid = mixed.new_zeros(nobodys + 1, mixed.shape[1] + dt.shape[1])
        laid[place] = torch.cat([mixed, dt], -1)
        wide, time = laid[:-1].unflatten(0, (-1, most)).split([mixed.shape[1], dt.shape[1]], -1)
        h, b, c = recurrences.split_mixed(mixer, wide)
        out = h.new_zeros(nobodys + 1, *h.shape[2:])
        by_channel = mixer.A.shape[0], mixer.head_dim
        selective_state_update(
            cache.temporal,
            h,
            time[..., None].expand_as(h),
            mixer.A.float()[:, None, None].expand(*by_channel, b.shape[-1]),
            b,
            c,
            mixer.D[:, None].expand(by_channel),
            dt_bias=mixer.dt_bias[:, None].expand(by_channel),
            dt_softplus=True,
            # A graph's slot without a request becomes the padding slot, of which the kernel keeps no state.
            state_batch_indices=slots.where(slots > 0, recurrences.PAD_SLOT),
            pad_slot_id=recurrences.PAD_SLOT,
            out=out[:-1].unflatten(0, (-1, most)),
            disable_state_update=True,
            intermediate_states_buffer=cache.intermediate_ssm,
            cache_steps=cache.intermediate_ssm.shape[1],
            intermediate_state_indices=torch.arange(len(slots), dtype=torch.int32, device=slots.device),
        )
        return out[place]


class RaggedMamba2Backend(RaggedMamba2, Mamba2AttnBackend):  # type: ignore[misc]
    """`Mamba2AttnBackend`, with the rows of a verification packed."""


OURS = {
    ShortConvAttnBackend: RaggedConvBackend,
    GDNAttnBackend: RaggedDeltaBackend,
    KDAAttnBackend: RaggedChannelDeltaBackend,
    Mamba2AttnBackend: RaggedMamba2Backend,
}
"""Our backends, by those of upstream's that they replace."""
