"""Extend SGLang's Triton attention to verifications whose requests have different widths.

Upstream's kernel (`extend_attention_fwd`) takes any number of query rows per request from `qo_indptr`; only the plan of
:class:`TritonAttnBackend` for a verification gives every request the same number. Keys and values of the prefix are
planned from `seq_lens` and are right for every width.

That kernel walks a request's prefix in one program for each query head, so a verification takes as long as its longest
request. SGLang calls `verify_splitkv_fwd` before it; here that is `verify_attention`, which splits long prefixes over
the chip, so its time depends on the sum of all prefixes.
"""

from functools import partial
from typing import Any

import torch
from sglang.srt.arg_groups.model_override_base import attention_backends_of
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.speculative.ragged_verify import resolve_ragged_verify_layout
from whiflash_kernels import dispatch, verify_attention
from whiflash_kernels.verify import EIGHT_BITS, sums_bytes

from whiflash_sglang.engine.carried import serves_ours

NARROWEST = 2048
"""Smallest window, in keys, for which `verify_attention` runs: a smaller one leaves little to split."""
WIDEST = 256
"""Largest head dimension for which it runs: a tile of wider heads does not fit."""


class RaggedTritonBackend(TritonAttnBackend):  # type: ignore[misc]
    """`TritonAttnBackend`, with the rows of a verification laid out as its `RaggedVerifyLayout` says."""

    supports_ragged_verify_graph = True

    def __init__(self, runner: Any, *args: Any, **named: Any) -> None:
        super().__init__(runner, *args, **named)
        # With one pool for all layers SGLang asks the model for its window, which not every class answers (Laguna).
        # Without an answer windowed layers are planned no keys. The kernel masks the narrower one of several windows.
        window = widest_window(runner.model)
        if window is not None:
            self.sliding_window_size = window
        self.use_verify_splitkv = not self.use_mla
        self._plans: dict[Any, Any] = {}
        self.verify_splitkv_fwd = torch.compiler.disable(partial(verify, plans=self._plans))
        self._make_room(0)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a forward over the packed rows of `forward_batch`, once for all layers."""
        self._plans.clear()
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_target_verify():
            return
        layout = resolve_ragged_verify_layout(forward_batch)
        if layout is not None:
            # The widest request's rows, `max_extend_len`, are upstream's `num_tokens_per_req` already.
            self.forward_metadata.qo_indptr = layout.qo_indptr_device

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Capture a forward's planning with it, since every replay has other lengths."""
        self._plans.clear()
        super().init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *buffers: Any, **named: Any) -> None:
        """Allocate buffers for the plans of captured verifications.

        Upstream sizes decoding's inputs by rows: room for a whole context each (and the splits of its kernel). Here
        every captured forward is a verification, in which a request reads one context, however many rows it has. Its
        offsets have room for the server's requests, and a graph has slots beside them.
        """
        super().init_cuda_graph_state(max_bs, max_bs, *buffers, **named)
        self._make_room(max_bs)
        if self.use_sliding_window_kv_pool:
            # Slots that a row writes to in the windowed layers' pool.
            self.cuda_graph_swa_out_cache_loc = torch.zeros(max_num_tokens, dtype=torch.int64, device=self.device)

    def _make_room(self, slots: int) -> None:
        """Allocate offsets, [requests + 1] each, for as many requests as the server takes, or for `slots` if those are
        more: of query rows, of keys, and of the keys within a window."""
        requests = max(slots, int(self.req_to_token_pool.size))

        def offsets(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(requests + 1, dtype=dtype, device=self.device)

        self.kv_indptr = offsets(torch.int32)
        self.qo_indptr, self.mask_indptr = offsets(torch.int64), offsets(torch.int64)
        if self.sliding_window_size is not None and self.sliding_window_size > 0:
            self.window_kv_indptr = offsets(torch.int32)

    def _update_target_verify_buffers(
        self, plan: Any, bs: int, seq_lens: Any, spec_info: Any, req_pool_indices: Any
    ) -> Any:
        written = super()._update_target_verify_buffers(plan, bs, seq_lens, spec_info, req_pool_indices)
        layout = spec_info.ragged_verify_layout
        if layout is not None:
            self.qo_indptr[: bs + 1].copy_(layout.padded_to_bucket(padded_bs=bs).qo_indptr_device)
        return written

    def _build_cuda_graph_forward_metadata(self, bs: int, forward_mode: Any, spec_info: Any, *rest: Any) -> Any:
        metadata = super()._build_cuda_graph_forward_metadata(bs, forward_mode, spec_info, *rest)
        if forward_mode.is_target_verify() and spec_info.ragged_verify_layout is not None:
            metadata.max_extend_len = spec_info.ragged_verify_layout.max_q_len
        return metadata


def verify(
    *given: Any,
    logit_cap: float,
    sliding_window_size: int,
    sinks: torch.Tensor | None,
    xai_temperature_len: int,
    plans: dict[Any, Any] | None = None,
    **_: Any,
) -> bool:
    """Attend in one layer of a verification. SGLang calls this as `verify_splitkv_fwd`. Shapes and `plans`: as in
    `verify_attention`.

    Args:
        given: the nine tensors of `verify_attention`; then a tree's mask, whether attention is causal, offsets of the
            mask, the most rows of a request, the factors of keys, values and scores.

    Returns:
        Whether it has run. Else `out` is as it was, and SGLang runs its own kernel: for a tree's masks, values that are
        not as wide as keys, pools that are packed, narrow windows, and with ``WHIFLASH_KERNELS=torch``.
    """
    tensors, (custom_mask, causal, _mask_indptr, most, k_scale, v_scale, scale) = given[:9], given[9:]
    q, k, v, _out, k_pool, v_pool, *_offsets = tensors
    narrow = 0 < sliding_window_size < NARROWEST
    if custom_mask is not None or not causal or xai_temperature_len > 0 or narrow:
        return False
    shapes = {tensor.shape[1:] for tensor in (k, v, k_pool, v_pool)}
    readable = {k_pool.dtype, v_pool.dtype} <= {q.dtype, *EIGHT_BITS}
    if len(shapes) > 1 or q.shape[2] != k.shape[2] or q.shape[2] > WIDEST or not readable:
        return False
    if dispatch.backend_for(q) == "torch":
        return False
    verify_attention(
        *tensors,
        most=most,
        scale=scale,
        # SGLang's kernel takes a window of 0 for none, though its backend plans one.
        window=sliding_window_size if sliding_window_size > 0 else None,
        cap=logit_cap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        plans=plans,
    )
    return True


def kept_bytes(runner: Any, slots: int, widest: int) -> int:
    """Return the bytes of partial sums that a layer's verification of `slots` requests keeps; 0 if not Triton."""
    config, parallel = runner.model_config, get_parallel()
    if "triton" not in attention_backends_of(get_exec().kernel) or config.attention_arch == AttentionArch.MLA:
        return 0
    heads = config.get_max_num_attention_heads() // parallel.attn_tp_size
    kv_heads = config.get_num_kv_heads(parallel.attn_tp_size)
    return sums_bytes(slots, widest, heads, kv_heads, config.head_dim, torch.device(runner.device))


def widest_window(model: Any) -> int | None:
    """Return the widest window of a loaded `model`'s layers: keys that a row sees before its own; None without one."""
    layers = (module for module in model.modules() if isinstance(module, RadixAttention))
    return max((size for layer in layers if (size := layer.sliding_window_size) > 0), default=None)


_upstreams = ATTENTION_BACKENDS["triton"]


def install() -> None:
    """Make SGLang's name `triton` give our backend in a server of ours. Idempotent."""
    register_attention_backend("triton")(_make)


def _make(runner: Any) -> Any:
    return RaggedTritonBackend(runner) if serves_ours() else _upstreams(runner)
