"""SGLang's Triton attention for verifications whose requests have different widths.

Upstream's kernel (`extend_attention_fwd`) takes any number of query rows per request from `qo_indptr`; only what
:class:`TritonAttnBackend` plans for a verification gives every request the same number. Keys and values of the prefix
are planned from `seq_lens` and are right for every width.
"""

from typing import Any

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.speculative.ragged_verify import resolve_ragged_verify_layout

from whiflash_sglang.compat.carried import serves_ours

_upstreams = ATTENTION_BACKENDS["triton"]


def install() -> None:
    """Let `triton` name this backend in a server of ours. Idempotent."""
    register_attention_backend("triton")(_create)


def _create(runner: Any) -> Any:
    return RaggedTritonBackend(runner) if serves_ours() else _upstreams(runner)


class RaggedTritonBackend(TritonAttnBackend):  # type: ignore[misc]
    """`TritonAttnBackend`, with the rows of a verification laid out as its `RaggedVerifyLayout` says; no graphs."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a forward over the packed rows of `forward_batch`, once for all layers."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_target_verify():
            return
        layout = resolve_ragged_verify_layout(forward_batch)
        if layout is not None:
            # The widest request's rows, `max_extend_len`, are upstream's `num_tokens_per_req` already.
            self.forward_metadata.qo_indptr = layout.qo_indptr_device

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """The plan of a captured forward, whose buffers upstream fills for one width.

        Raises:
            NotImplementedError: `forward_batch` is a verification.
        """
        if forward_batch.forward_mode.is_target_verify():
            raise NotImplementedError(
                "WHIFLASH's Triton attention verifies without graphs; give --cuda-graph-backend-decode disabled"
            )
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
