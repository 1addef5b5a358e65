"""Extend SGLang's FlashAttention to captured verifications whose requests have different widths.

Upstream plans them before each replay, in ten launches. A :class:`~whiflash_sglang.engine.forward.graphs.GraphLayout`
stays where it is, so the graph plans them from it, as upstream's does if all requests have one width. In a graph of
rounds without drafts every layer makes upstream's call of decoding, with one schedule for all layers.

SGLang's class can be imported only where there is CUDA, so an instance changes its class once a runner has made it.
"""

from functools import cache, partial
from typing import Any

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

from whiflash_sglang.engine.carried import serves_ours
from whiflash_sglang.engine.forward.graphs import GraphLayout
from whiflash_sglang.engine.patching import become
from whiflash_sglang.errors import IncompatibleEngineError

USED = (
    "_bind_metadata_buffers",
    "_capture_unified_verify_metadata",
    "_compute_scheduler_metadata",
    "_set_decode_page_metadata",
    "forward_decode",
    "forward_extend",
    "init_forward_metadata_in_graph",
)
"""Members of `FlashAttentionBackend` that are replaced or called."""


@cache
def _planning(upstreams: Any) -> Any:
    """Return a subclass of SGLang's class that plans in graphs. Raises IncompatibleEngineError if a member is gone."""
    gone = [name for name in USED if not hasattr(upstreams, name)]
    if gone:
        raise IncompatibleEngineError(
            f"{upstreams.__name__} has no {', '.join(gone)}: WhiFlash needs the pinned SGLang"
        )

    class RaggedFlashBackend(upstreams):  # type: ignore[misc]
        def _capture_unified_verify_metadata(self, forward_batch: Any) -> bool:
            in_graph = _layout(self, forward_batch.spec_info) is not None
            return in_graph or bool(super()._capture_unified_verify_metadata(forward_batch))

        def _bind_metadata_buffers(
            self, bs: int, num_tokens: int, encoder_lens: Any, forward_mode: Any, spec_info: Any, device: Any
        ) -> Any:
            bound = super()._bind_metadata_buffers(bs, num_tokens, encoder_lens, forward_mode, spec_info, device)
            layout = _layout(self, spec_info)
            if layout is not None:
                bound[0].cu_seqlens_q, bound[0].max_seq_len_q = layout.qo_indptr_device, layout.max_q_len
                bound[0].max_seq_len_k = bound[0].page_table.shape[1] * self.page_size
            return bound

        def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
            layout, rows = _layout(self, forward_batch.spec_info), forward_batch.req_pool_indices
            if layout is None or layout.slots is None:
                super().init_forward_metadata_in_graph(forward_batch)
                return
            metadata = self.target_verify_metadata[forward_batch.batch_size]
            self._set_decode_page_metadata(None, metadata, rows, layout.slots.ends, 0)
            if layout.max_q_len == 1:
                # Otherwise every layer would compute this schedule again.
                metadata.scheduler_metadata = self._compute_scheduler_metadata(
                    len(rows), metadata.max_seq_len_k, metadata.cache_seqlens_int32, metadata.cu_seqlens_q
                )

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **named: Any
        ) -> Any:
            layout = _layout(self, forward_batch.spec_info)
            decodes = layout is not None and layout.max_q_len == 1
            forward = super().forward_decode if decodes else super().forward_extend
            return forward(q, k, v, layer, forward_batch, *args, **named)

    return RaggedFlashBackend


def _layout(backend: Any, spec_info: Any) -> GraphLayout | None:
    """Return a verification's layout if attention is planned inside its graph; None if the host must plan it."""
    layout = getattr(spec_info, "ragged_verify_layout", None)
    plans = backend.topk <= 1 and not backend.kv_index_translator.reads_are_translated
    return layout if isinstance(layout, GraphLayout) and plans else None


_upstreams = {name: ATTENTION_BACKENDS[name] for name in ("fa3", "fa4")}


def install() -> None:
    """Make SGLang's names of FlashAttention give our subclass in a server of ours. Idempotent."""
    for name, make in _upstreams.items():
        register_attention_backend(name)(partial(_make, make))


def _make(make: Any, runner: Any) -> Any:
    made = make(runner)
    upstreams: Any = type(made)
    if serves_ours() and upstreams.__name__ == "FlashAttentionBackend":
        become(made, _planning(upstreams))
    return made
