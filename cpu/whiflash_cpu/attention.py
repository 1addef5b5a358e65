"""SGLang's attention on the CPU: one backend for every forward mode.

bfloat16 runs in a compiled kernel (:mod:`whiflash_kernels.cpu.paged_attention`) where this machine can compile it;
other dtypes, and machines without a compiler, run in torch (:mod:`whiflash_kernels.reference.paged_attention`).

The plan of a forward (slots, masks) is built at its first layer and shared by all later layers; a model that
mixes causal, non-causal and sliding-window layers gets one plan per kind. Windowed layers may have a pool of their own
(`--swa-full-tokens-ratio`), whose slots the request table's are mapped to.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from whiflash_kernels.cpu.compiler import available
from whiflash_kernels.cpu.paged_attention import CompiledAttention, CompiledPlan, compiled_attention, fits
from whiflash_kernels.layers import write_rows
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan

from whiflash_sglang.embedded import cache_root
from whiflash_sglang.files.cpu import ATTENTION_BACKEND


class CpuAttentionBackend(AttentionBackend):
    """Runs attention over the paged pool: prefill (with prefix, chunked), decoding, verification and draft blocks."""

    def __init__(self, model_runner: Any, *, draft_offset: int = 0) -> None:
        """Read the pools of the model runner. draft_offset: entries beyond ``seq_lens`` that a decoding row sees, its
        own included: step i of a draft chain sees i + 1. 0 for plain decoding: ``seq_lens`` counts the row itself."""
        super().__init__()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = pool = model_runner.token_to_kv_pool
        layers = pool.layers_mapping if isinstance(pool, BaseSWAKVPool) else {}
        self._own_pool = frozenset(layer for layer, (_, windowed) in layers.items() if windowed)
        self._draft_offset = draft_offset
        self._q_lens: Sequence[int] = ()
        self._kv_lens: Sequence[int] = ()
        self._rows: torch.Tensor | None = None
        self._plans: dict[tuple[bool, int | None, bool, bool], PagedAttentionPlan | CompiledPlan] = {}
        self._windowed: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Read the batch's lengths once; each kind of layer builds its plan from them at its first call."""
        self._plans = {}
        self._rows = forward_batch.req_pool_indices
        mode = forward_batch.forward_mode
        seq_lens: list[int] = forward_batch.seq_lens.tolist()
        if mode.is_decode_or_idle():
            self._q_lens = [1] * len(seq_lens)
            self._kv_lens = [n + self._draft_offset for n in seq_lens]
        elif mode.is_target_verify():
            # In a verification, seq_lens does not count the rows that are being verified.
            self._q_lens = _verify_widths(forward_batch.spec_info, len(seq_lens))
            self._kv_lens = [n + m for n, m in zip(seq_lens, self._q_lens, strict=True)]
        else:
            self._q_lens = forward_batch.extend_seq_lens.tolist()
            self._kv_lens = seq_lens
        if self._own_pool:
            self._windowed = self._in_own_pool(forward_batch.out_cache_loc)

    def _plan(
        self, layer: RadixAttention, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> PagedAttentionPlan | CompiledPlan:
        causal = not (layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY)
        window = layer.sliding_window_size if layer.sliding_window_size not in (None, -1) else None
        compiled = attention_kernel() if fits(q, k_cache, v_cache) else None
        own_pool = layer.layer_id in self._own_pool
        key = (causal, window if causal else None, compiled is not None, own_pool)
        if key not in self._plans:
            table, rows = self.req_to_token_pool.req_to_token, self._rows
            if own_pool and self._windowed is not None:
                table, rows = self._windowed[0], None
            build = PagedAttentionPlan.build if compiled is None else compiled.plan
            lengths = self._q_lens, self._kv_lens
            self._plans[key] = build(table, *lengths, causal=causal, request_rows=rows, window=key[1])
        return self._plans[key]

    def _in_own_pool(self, written: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the batch's slots in the windowed layers' pool, [requests, positions] int32, and its slots to write.

        They are read before the forward, since the scheduler may change the tables during it. A position before the
        window may have no slot: its entry is 0, and the mask hides it.
        """
        translate = self.token_to_kv_pool.translate_loc_from_full_to_swa
        table = self.req_to_token_pool.req_to_token[self._rows, : max(self._kv_lens, default=0)]
        return translate(table.long()).int(), None if written is None else translate(written.long())

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        _refuse_unsupported(layer)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            own = None if self._windowed is None else self._windowed[1]
            if own is not None and self._draft_offset:  # this step's own slots, not all of the chain's
                own = pool.translate_loc_from_full_to_swa(forward_batch.out_cache_loc.long())
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, own), k, v)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k_cache, v_cache = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        plan = self._plan(layer, query, k_cache, v_cache)
        rows, padded = plan.num_rows, query.shape[0]
        out = plan.run(query[:rows], k_cache, v_cache, layer.scaling, sinks)
        out = out.reshape(rows, layer.tp_q_head_num * layer.v_head_dim)
        return out if padded == rows else torch.nn.functional.pad(out, (0, 0, 0, padded - rows))

    forward_decode = forward_extend

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the sequence length of a request that only pads a batch (DP attention): 1 token."""
        return 1

    def support_triton(self) -> bool:
        return False


@cache
def attention_kernel() -> CompiledAttention | None:
    """Return the compiled attention kernel; None if it cannot be compiled, and torch runs instead."""
    return available("CPU attention", compiled_attention, cache_root() / "compiled")


class CpuMultiStepDraftBackend:
    """The attention of an EAGLE chain's decoding steps: one backend per step, each seeing one more token."""

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        if topk != 1:
            raise ValueError(
                f"--speculative-eagle-topk {topk}: the CPU platform drafts chains only; use --speculative-eagle-topk 1"
            )
        self.attn_backends = [
            CpuAttentionBackend(model_runner, draft_offset=step + 1) for step in range(speculative_num_steps - 1)
        ]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def register_attention_backend() -> None:
    """Register the backend with SGLang.

    Latent attention (MLA) uses the absorbed form in every forward, prefills too: queries and keys have the latent
    width, values are its first part, and the pool holds both. Upstream's other forms pass keys that no pool holds.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    ATTENTION_BACKENDS.setdefault(ATTENTION_BACKEND, CpuAttentionBackend)
    AttentionBackendRegistry.register(ATTENTION_BACKEND, lambda *_: AttnForwardMethod.MLA)


def _verify_widths(spec_info: Any, batch_size: int) -> list[int]:
    """Return the number of query rows per request of a verification: from the ragged layout if there is one."""
    layout = getattr(spec_info, "ragged_verify_layout", None)
    if layout is not None:
        widths = layout.verify_lens_cpu
        return list(widths) if widths is not None else layout.verify_lens.tolist()
    return [spec_info.draft_token_num] * batch_size


def _refuse_unsupported(layer: RadixAttention) -> None:
    if layer.is_cross_attention or layer.logit_cap:
        kind = "cross attention" if layer.is_cross_attention else f"a logit cap of {layer.logit_cap}"
        raise NotImplementedError(
            f"attention backend {ATTENTION_BACKEND}: layer {layer.layer_id} uses {kind}, which it does not "
            "serve; start with --attention-backend torch_native"
        )


class CpuKVPool(MHATokenToKVPool):
    """SGLang's multi-head pool, with torch copies in place of its Triton ones.

    Layout (upstream's): one ``[size + page_size, Hkv, D]`` tensor for K and one for V per layer, contiguous.
    """

    def _init_kv_copy_and_warmup(self) -> None:
        self._kv_copy_config = None

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        write_rows(cache_k, cache_v, self.k_buffer[layer_idx], self.v_buffer[layer_idx], loc)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy the entries of slots ``src_loc`` to ``tgt_loc`` ([n] int64 each) in every layer."""
        if tgt_loc.numel() == 0:
            return
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer.index_copy_(0, tgt_loc, buffer.index_select(0, src_loc))
