"""Replay verifications from captured graphs: one graph for each number of packed rows, whatever each request's width.

SGLang's own runner does the capturing and the replaying. Its graphs of ragged verifications ("compact") come in sizes
that are multiples of the widest block, so that three requests of one row each would replay seventeen rows; here the
sizes are counts of rows. The widths are data: only their sum chooses the graph.

A graph's rows beyond those of the batch belong to slots without a request. There are always enough of them that no
request of the batch is prolonged and no slot has more than `widest` rows, the bound that attention kernels are
captured with. Their K and V go to KV slot 0, which nobody reads.

A batch in which every request has one row, its bonus token's, replays a graph of its own for the same rows (`PLAIN`).
Attention is captured there for one row a slot, as SGLang captures decoding: FA3 is called exactly as for decoding.

The device's work after the forward is captured with it (`Target.end_graphs_with`): a function in the model runner's
`capture_tail_hooks` is called as `hook(runner, output, forward_batch, rows)` inside the captured region. There
`forward_batch.spec_info.ragged_verify_layout` holds a replay's widths on the device, padded to the graph's slots.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, TypeVar

import torch
from msgspec.structs import replace
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocation import assign_req_to_token_pool_func
from sglang.srt.model_executor.cuda_graph_buffer_registry import PaddingPolicy
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner_utils.pool import (
    get_or_create_global_graph_capture_stream,
    get_or_create_global_graph_memory_pool,
    graph_pool_capture_scope,
    graph_pool_replay_scope,
)
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.ragged_verify import (
    RaggedVerifyLayout,
    RaggedVerifyMode,
    resolve_ragged_verify_layout,
    round_up_grid,
)
from triton.runtime.errors import OutOfResources
from whiflash_kernels import GraphSlots, fill_slots

from whiflash_sglang.device.capture import MOST_DRAFTS, Recorder, doubling, graded
from whiflash_sglang.engine.forward.recurrent import rows_counted

T = TypeVar("T")

PLAIN = "plain"
"""SGLang's label of the graphs of rounds in which no request has a draft."""

WARM_UPS = 2
"""Runs before a capture: kernels are compiled, libraries pick their algorithms, and tables of addresses are made."""


class CudaRecorder:
    """Captures drafters' passes into the memory that the target's graphs share.

    Two graphs never replay at once, so their temporary tensors may share memory.
    """

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        stream = get_or_create_global_graph_capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                try:
                    body()
                except OutOfResources as error:
                    # A kernel needs more of a multiprocessor than there is; it is no RuntimeError.
                    raise RuntimeError(str(error)) from error
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = get_or_create_global_graph_memory_pool(torch.cuda)
        with graph_pool_capture_scope(), torch.cuda.graph(graph, pool=pool, stream=stream):
            result = body()

        def again() -> None:
            with graph_pool_replay_scope():
                graph.replay()

        return again, result


def enabled(device: torch.device) -> bool:
    """Whether this server captures graphs: not on a CPU, nor with `--disable-cuda-graph`."""
    return device.type == "cuda" and get_exec().graph.cuda_graph_config.decode.backend != Backend.DISABLED


def captures_passes(device: torch.device) -> bool:
    """Whether drafters' passes are captured too: not where several ranks choose each draft together."""
    return enabled(device) and get_parallel().attn_tp_size == 1


def recorder(model_runner: Any) -> Recorder | None:
    """Return a recorder that captures drafters' passes; None if every pass runs eagerly."""
    return CudaRecorder() if captures_passes(torch.device(model_runner.device)) else None


def install(model_runner: Any, mode: CaptureHiddenMode) -> None:
    """Let the target's runner capture `VerifyGraphs` if it captures any graphs. mode: hidden states that they keep."""
    graphs = type(VerifyGraphs.__name__, (VerifyGraphs,), {"mode": mode})
    model_runner._decode_cuda_graph_runner_cls = lambda: graphs

    def logits_rows() -> int:
        """Return the rows of the largest graph, for the buffer of logits: SGLang counts each request at its widest."""
        widest = int(get_spec().speculative_num_draft_tokens)
        return most_rows(type(model_runner).max_decode_logits_rows(model_runner) // widest, widest)

    model_runner.max_decode_logits_rows = logits_rows


def most_rows(requests: int, widest: int) -> int:
    """Return the rows of the largest verification of up to `requests` requests, at most `widest` each."""
    return requests + min(requests * (widest - 1), MOST_DRAFTS)


def spare_slots(requests: int, widest: int) -> int:
    """Return how many slots without a request a graph needs for its unused rows, of at most `widest` rows each.

    The host packs for more drafts than there may be, so a batch may use only one row a request.
    """
    return max(ceil((most_rows(requests, widest) - requests) / widest), 1)


def plain_rows(buckets: Sequence[int], requests: int, slots: int) -> list[int]:
    """Return the graph sizes for up to `requests` requests of one row each. slots: requests that a graph can hold."""
    most = min(round_up_grid(requests, buckets), slots)
    return [rows for rows in buckets if rows <= most]


def bytes_for(requests: int, widest: int, *, vocabulary: int, row_bytes: int) -> int:
    """Return the bytes that graphs of up to `requests` requests keep permanently, apart from memory that replays share.

    Args:
        vocabulary: all graphs write their logits to the same 32-bit buffer. row_bytes: those of the features and hidden
        states of one row, of which every graph has its own.
    """
    buckets = graded(most_rows(requests, widest))
    plain = plain_rows(buckets, requests, requests + spare_slots(requests, widest))
    return buckets[-1] * vocabulary * 4 + sum((*buckets, *plain)) * row_bytes


class GraphLayout(RaggedVerifyLayout, frozen=True):  # type: ignore[call-arg, misc]
    """The layout of a graph's slots, those without a request included, in the tensors that the graph reads.

    `max_q_len`: most rows of a slot, with which attention is captured.
    """

    slots: GraphSlots | None = None

    def padded_to_bucket(self, *, padded_bs: int, cap: int | None = None) -> "GraphLayout":
        """Return this layout without padding: no slot has more than `VerifyGraphs.widest` rows."""
        return self


class VerifyGraphs(DecodeCudaGraphRunner):  # type: ignore[misc]
    """Captures and replays the target's graphs, by numbers of rows.

    requests: most requests of a batch that is replayed; widest: most rows of one of them. mode: hidden states to keep.
    plain: whether the graph that is captured, or was replayed last, is one of `PLAIN`.
    """

    capture_bs: list[int]
    mode = CaptureHiddenMode.FULL
    plain = False

    def __init__(self, model_runner: Any, *, attn_backend: Any = None) -> None:
        self.widest = int(get_spec().speculative_num_draft_tokens)
        # Upstream refuses adapters with packed rows, but its LoRA backend reads our layout (`lora`).
        self._adapters, model_runner.lora_manager = model_runner.lora_manager, None
        try:
            # Upstream counts its shapes in requests of one width; with a width of one it counts rows.
            with envs.SGLANG_RAGGED_VERIFY_MODE.override(RaggedVerifyMode.COMPACT.value):
                super().__init__(model_runner, attn_backend=attn_backend, speculative_num_draft_tokens=1)
        finally:
            model_runner.lora_manager = self._adapters
        for name in ("seq_lens", "req_pool_indices"):  # `load_batch` fills them
            slot = self.buffer_registry.get_slot(name)
            slot.copy_from_fb, slot.padding_policy = False, PaddingPolicy.KEEP_PAD
        if torch.device(self.device).type == "cuda":
            self._compile_allocation()

    def _compile_allocation(self) -> None:
        """Launch SGLang's kernel that writes a batch's new slots to its table, with no slots: Triton compiles it for
        each doubling of requests and for slots at odd places."""
        none = torch.zeros(self.requests, dtype=torch.int32, device=self.device)
        rows, slots = none.long(), torch.zeros(2, dtype=torch.int64, device=self.device)
        for size in doubling(1, self.requests):
            for first in range(2):
                assign_req_to_token_pool_func(
                    rows, self.model_runner.req_to_token_pool.req_to_token, none, none, slots[first:], size
                )

    def capture(self) -> None:
        self.model_runner.lora_manager = self._adapters
        if self._adapters is not None:
            self._adapters.init_decode_cuda_graph_batch_info(self.max_bs, num_tokens_per_req=self.widest)
        super().capture()

    def rows_for(self, total: int, requests: int) -> int | None:
        """Return the rows to pack a batch into: those of the smallest graph that holds it; None if no graph does."""
        if requests > self.requests or total > self.capture_num_tokens[-1]:
            return None
        return int(round_up_grid(total, self.capture_num_tokens))

    def get_spec_info(self, num_tokens: int) -> DFlashVerifyInput:
        """Return a captured verification's input: `num_tokens` rows under a layout whose tensors the graph keeps."""
        return DFlashVerifyInput(
            draft_token=None,
            positions=None,
            draft_token_num=rows_counted(self.model_runner, min(num_tokens, self.widest)),
            capture_hidden_mode=self.mode,
            ragged_verify_layout=self._layout(num_tokens),
        )

    def _build_ragged_verify_token_buckets(self) -> list[int]:
        self.requests = max(self.capture_bs)
        # With DP attention, ranks that attend together take equal parts of a graph's rows.
        parallel = get_parallel()
        multiple = parallel.attn_tp_size if parallel.attn_dp_size > 1 else 1
        sizes = graded(most_rows(self.requests, self.widest))
        buckets = sorted({-(-rows // multiple) * multiple for rows in sizes})
        self.max_bs = self.requests + spare_slots(self.requests, self.widest)
        self.capture_bs = buckets
        # With DP attention only some ranks may draft, but the collective calls of all must be those of one graph.
        alone = parallel.attn_dp_size == 1
        self._plain_rows = plain_rows(buckets, self.requests, self.max_bs) if alone else []
        return buckets

    def capture_one_shape(self, size: int, forward: Any, *streams: Any) -> None:
        super().capture_one_shape(size, forward, *streams)
        if size in self._plain_rows:
            self.plain = True
            super().capture_one_shape(size, forward, *streams[:2], PLAIN)
            self.plain = False

    def _resolve_attention_variant(self, forward_batch: Any, capture_batch_size: int) -> Any:
        if self.plain:
            return PLAIN
        return super()._resolve_attention_variant(forward_batch, capture_batch_size)

    def _autotune_buffers(self) -> tuple[Any, int]:
        # The dummy forward has the widest block for each request, and the buffers have rows for no more requests.
        return self.buffers, self.requests

    def _layout(self, rows: int) -> Any:
        """Return the layout of the graph of `rows` rows, plain or not; graphs of both kinds read the same tensors."""
        layout = self._capture_ragged_verify_layout(rows)
        return replace(layout, max_q_len=1) if self.plain else layout

    def _capture_ragged_verify_layout(self, num_tokens: int) -> GraphLayout:
        layouts = self._captured_ragged_layouts
        if num_tokens not in layouts:
            count = self._ragged_capture_slots(num_tokens)
            widths, offsets, ends = (
                torch.zeros(size, dtype=torch.int32, device=self.device) for size in (count, count + 1, count)
            )
            rows, starts = self.buffers.req_pool_indices[:count], self.buffers.seq_lens[:count]
            slots = GraphSlots(widths, offsets, starts, ends, rows)
            # This call without a request compiles the kernel.
            fill_slots(widths[:0], starts[:0], rows[:0], slots, rows=num_tokens, empty=self.seq_len_fill_value)
            tier = round_up_grid(num_tokens, self.capture_num_tokens)
            layouts[num_tokens] = GraphLayout(
                *(widths, tier, offsets[:-1], offsets),
                total_verify_tokens=tier,
                max_q_len=min(self.widest, num_tokens),
                slots=slots,
            )
        return layouts[num_tokens]

    def load_batch(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
        live = resolve_ragged_verify_layout(forward_batch)
        if live is not None and not isinstance(live, GraphLayout):
            rows = live.graph_num_tokens
            self.plain = live.max_q_len == 1 and rows in self._plain_rows
            layout = self._layout(rows)
            requests = live.verify_lens, forward_batch.seq_lens, forward_batch.req_pool_indices
            fill_slots(*requests, layout.slots, rows=rows, empty=self.seq_len_fill_value)
            forward_batch.spec_info.ragged_verify_layout = layout
        super().load_batch(forward_batch, pp_proxy_tensors)

    def _stage_ragged_verify_layout(self, ragged_layout: RaggedVerifyLayout, graph_size_key: int) -> None:
        """Do nothing, since `load_batch` has staged the layout."""

    def _can_run_ragged_verify_graph(self, forward_batch: Any, ragged_layout: RaggedVerifyLayout) -> bool:
        # Upstream replays the next larger graph. Here rows are packed already, so their number must be a graph's.
        rows, requests = ragged_layout.graph_num_tokens, forward_batch.batch_size
        return (
            rows in self.capture_num_tokens
            and requests <= min(rows, self.requests)
            and bool(super()._can_run_ragged_verify_graph(forward_batch, ragged_layout))
        )
