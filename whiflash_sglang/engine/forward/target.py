"""Run the target model for the worker: one capture, prefills and packed verifications.

A target that takes images has a time, a height and a width for each token's position (M-RoPE). They are equal for text.
After an image they differ from the position by the request's delta. SGLang lays them out for drafts of one length.
"""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    get_server_return_hidden_states_mode,
)
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout
from sglang.srt.speculative.spec_utils import prepare_mamba_track_for_verify
from whiflash_kernels import MixedBlock, prepare_mixed_block

from whiflash_sglang.device.transfers import sent
from whiflash_sglang.engine.forward import graphs, lora, recurrent
from whiflash_sglang.engine.forward.captured import Captured, LoadedTarget
from whiflash_sglang.engine.forward.peers import PackedBatch, Peers
from whiflash_sglang.engine.forward.recurrent import rows_counted
from whiflash_sglang.engine.forward.sampling import count_earlier_output
from whiflash_sglang.engine.patching import around
from whiflash_sglang.records.core import Verified


class GraphEnd(Protocol):
    """The work at the end of a verification's graph, captured after its forward (`round/ends.py`)."""

    def capture(self, graph: tuple[int, int, bool], of_graph: Callable[[], Verified]) -> None: ...


class Target(LoadedTarget):
    """Wraps SGLang's worker of the target. Raises CheckpointError if the model cannot capture its layers' outputs."""

    def __init__(self, target_worker: Any) -> None:
        super().__init__(target_worker)
        self.context_len = int(target_worker.model_config.context_len)
        self.tokenizer: Any = target_worker.tokenizer
        # All ranks of a replica must have the same seed, and replicas shall have different ones.
        self.random_seed = int(target_worker.random_seed) + (get_parallel().dp_rank or 0)
        self.peers = Peers()
        recurrent.install(target_worker.model_config, self.device)
        lora.require_plain_layers(self.runner.lora_manager)

    @property
    def slot_table(self) -> torch.Tensor:
        """Return the table [request rows, ctx] int32: request row and position → KV slot."""
        table: torch.Tensor = self.runner.req_to_token_pool.req_to_token
        return table

    @property
    def kv_slots(self) -> int:
        """Return the number of slots of the target's KV pool, the padding page included."""
        pool = self.runner.token_to_kv_pool
        return int(pool.size) + int(pool.page_size)

    def capture(self, layers: Sequence[int], *, final_hidden: bool) -> None:
        """Capture the outputs of `layers` (ascending) in every forward that asks for hidden states. The target's number
        of layers means the state after the final norm.

        A server whose clients may ask for hidden states keeps the final ones too, as does one with `final_hidden`.
        Sets `row_bytes`, the bytes that are captured of a row.
        """
        keeps_final = final_hidden or get_server_return_hidden_states_mode().need_capture()
        self._captured = Captured(self.model, self.shape.num_layers, layers, keeps_final=keeps_final)
        self.row_bytes = self._captured.vectors * self.shape.hidden_size * self.dtype.itemsize
        graphs.install(self.runner, self._captured.mode)

    def prefill(self, batch: Any) -> tuple[Any, torch.Tensor]:
        """Run the target over an extend batch. Returns SGLang's result with the first tokens, and features [tokens, F].

        The result has the hidden states that the batch's requests asked for, if any.
        """
        count_earlier_output(batch)
        result = self.worker.forward_batch_generation(batch, capture_hidden_mode=self._captured.mode)
        output = result.logits_output
        if output.next_token_logits is None:
            # The batch wants scores at positions. SGLang keeps no states for them, and no slot, as the cache is off.
            shape = sum(batch.extend_lens), self._captured.read * self.shape.hidden_size
            return result, torch.zeros(shape, dtype=self.dtype, device=self.device)
        features, final = self._captured.take(output)
        # SGLang does not cut the rows with which it padded the batch to those of its peers.
        features = features[: len(batch.input_ids)]
        if batch.return_hidden_states:
            if final is None:
                raise AssertionError("SGLang admits such requests only where the server keeps hidden states")
            asked = max(batch.return_hidden_states_mode, get_server_return_hidden_states_mode())
            ends = sent(batch.extend_lens, final.device).cumsum(0)
            output.hidden_states = final if asked.is_full() else final[ends - 1]
        return result, features

    def rows_for(self, rows: int, requests: int) -> int | None:
        """Return the rows of a verification with room for `rows` rows: those of the smallest graph that holds them. If
        none does, `rows` with several ranks, else None: then the host counts them (`agreed_rows`)."""
        graph = self._graph_for(rows, requests)
        return rows if graph is None and get_parallel().tp_size > 1 else graph

    def agreed_rows(self, rows: int, requests: int, widths: torch.Tensor | None = None) -> int:
        """Return `rows_for` of the next verification. With DP attention all ranks agree on it and must call it at once.

        widths: [B] int32 of the requests, if `rows` only bounds their sum. Attention writes no rows beyond the sum; a
        graph has spare slots for them. Without a graph the host reads the sum, unless other ranks take part, whose sums
        may differ.
        """
        graph = self._graph_for(rows, requests)
        if graph is None and widths is not None and get_parallel().tp_size == 1:
            rows = int(widths.sum())
        return self.peers.agree(rows, graph)

    def _graph_for(self, rows: int, requests: int) -> int | None:
        runner = self.runner.decode_cuda_graph_runner
        return runner.rows_for(rows, requests) if isinstance(runner, graphs.VerifyGraphs) else None

    def join(self, batch: Any) -> None:
        """Take part in the other ranks' verification without a request. batch: SGLang's, idle."""
        if self.peers.size == 1:
            return
        rows = self.peers.agree(0, self._graph_for(1, 1))
        if not self.peers.replays:
            self._forward(batch)
            return
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        widths = none.to(torch.int32)
        block = prepare_mixed_block(none, none[:, None], widths, none, none, self.slot_table, rows=rows)
        self.forward(batch, block, widths, 1)

    @cached_property
    def _rows_counted(self) -> int:
        """Return the rows that attention counts per request; 0 if it varies. Cached, as it reads configurations."""
        return rows_counted(self.runner, 0)

    def forward(self, batch: Any, block: MixedBlock, widths: torch.Tensor, stride: int) -> Any:
        """Return SGLang's result of a verification's forward. Arguments as in `verify`; batch may be `batch_of`'s."""
        batch.out_cache_loc = block.cache_slots
        batch.input_ids, batch.forward_mode = block.input_ids, ForwardMode.TARGET_VERIFY
        batch.extend_input_logprob_token_ids = None  # left by a prefill: SGLang would send it again
        batch.spec_info = verify_input(block, widths, stride, self._captured.mode, self._rows_counted)
        if batch.reqs:  # made-up requests keep no states
            prepare_mamba_track_for_verify(batch)
        return self._forward(batch)

    def batch_of(self, rows: torch.Tensor, starts: torch.Tensor, on_host: torch.Tensor) -> ScheduleBatch:
        """Make a decode batch of SGLang's without its requests.

        rows: of the request table; starts: tokens with KV; both [B] int64. on_host: `starts` on the host, or bounds.
        """
        return ScheduleBatch(
            reqs=[],
            device=str(self.device),
            forward_mode=ForwardMode.DECODE,
            req_pool_indices=rows,
            seq_lens=starts,
            seq_lens_cpu=on_host,
            seq_lens_sum=int(on_host.sum()),
            orig_seq_lens=starts.to(torch.int32),
            spec_algorithm=self.runner.spec_algorithm,
        )

    def _forward(self, batch: Any) -> Any:
        self.peers.count(batch)
        # The runner plans the attention of every verification: a plan of `prepare_for_verify` would be a second one.
        mode = {"capture_hidden_mode": self._captured.mode, "return_hidden_states_before_norm": False}
        forward_batch = PackedBatch.init_new(batch, self.runner, **mode)
        return self.worker.forward_batch_generation(batch=None, forward_batch=forward_batch, is_verify=True)

    def end_graphs_with(self, ends: GraphEnd) -> None:
        """Let `ends` be captured after the forward in every verification's graph."""

        def end(runner: Any, output: Any, forward_batch: Any, rows: int) -> None:
            layout = forward_batch.spec_info.ragged_verify_layout
            if layout is None:
                return
            packed = forward_batch.input_ids, layout.qo_indptr_device
            requests = forward_batch.seq_lens, forward_batch.req_pool_indices
            graph = id(runner), rows, runner.plain
            ends.capture(graph, partial(self._rows_of, copy(output), *packed, *requests))

        self.runner.capture_tail_hooks.append(end)

    def _rows_of(self, output: Any, *packed: Any) -> Verified:
        features, final = self._captured.states(output)
        return Verified(output.next_token_logits, features, final, *packed)

    def verify(self, batch: Any, block: MixedBlock, widths: torch.Tensor, stride: int) -> Verified:
        """Run one forward over the packed rows of all requests, each of which costs only the rows that it has.

        `block` has `agreed_rows` of its rows; those beyond the widths' sum go through the forward with the others.
        widths, stride: as in `verify_input`.
        """
        result = self.forward(batch, block, widths, stride)
        output, runner = result.logits_output, self.runner.decode_cuda_graph_runner
        states = self._captured.take(output)
        packed = block.input_ids, block.qo_indptr, batch.seq_lens, batch.req_pool_indices
        replayed = (id(runner), len(block.input_ids), runner.plain) if result.can_run_cuda_graph else None
        return Verified(output.next_token_logits, *states, *packed, forward=result, graph=replayed)

    def commit(self, batch: Any, starts: torch.Tensor, accept_lens: torch.Tensor) -> None:
        """Commit the target's recurrent states, if any, after each request's last row that `verify`'s result accepts.

        starts, accept_lens: [B] int, as in `recurrent.commit`.
        """
        recurrent.commit(self.runner.attn_backend, self.model, batch, starts, accept_lens)


def verify_input(
    block: MixedBlock,
    widths: torch.Tensor,
    stride: int,
    mode: CaptureHiddenMode = CaptureHiddenMode.FULL,
    counted: int = 0,
) -> DFlashVerifyInput:
    """Return a verification as SGLang's attention backends read it: packed rows, and how many each request has.

    Attention plans for all rows of the block, since the host does not know the widths. The layout is there with equal
    widths too: without one a backend may take the widest block that the server was configured for (fa3 does).

    Args:
        widths: [B] int32, by which `block` was packed. stride: rows of the widest request, at least. A graph is chosen
            by the rows of `block`, its padding included, and by whether `stride` is 1. mode: hidden states that the
            forward keeps. counted: rows of a request that recurrent layers count, if not `stride`.
    """
    rows = int(block.input_ids.shape[0])
    layout = RaggedVerifyLayout(
        verify_lens=widths,
        graph_num_tokens=rows,
        extend_start_loc=block.qo_indptr[:-1],
        qo_indptr_device=block.qo_indptr,
        total_verify_tokens=rows,
        max_q_len=stride,
    )
    return DFlashVerifyInput(
        draft_token=block.input_ids,
        positions=block.positions,
        draft_token_num=counted or stride,
        capture_hidden_mode=mode,
        ragged_verify_layout=layout,
    )


@around(
    "sglang.srt.model_executor.forward_batch_info:ForwardBatch.compute_spec_mrope_positions",
    params=("model_runner", "batch"),
    why="SGLang lays positions out for one width",
    until="it asks the layout",
)
def _of_packed_rows(original: Any, self: ForwardBatch, model_runner: Any, batch: Any, *args: Any, **named: Any) -> None:
    """Compute M-RoPE positions of packed rows.

    Sets `mrope_positions` [3, T] int64 of T rows, packed by a layout of any widths and padded at the end.
    """
    layout = getattr(batch.spec_info, "ragged_verify_layout", None)
    if layout is None:
        original(self, model_runner, batch, *args, **named)
        return
    positions = batch.spec_info.positions.to(torch.int64)
    deltas = [0 if each is None else int(each.mrope_position_delta.item()) for each in batch.multimodal_inputs or ()]
    if any(deltas):
        rows = torch.arange(len(positions), device=positions.device)
        requests = torch.searchsorted(layout.qo_indptr_device[1:].to(torch.int64), rows, right=True)
        positions = positions + sent(deltas, positions.device)[requests.clamp(max=len(deltas) - 1)]
    self.mrope_positions = positions.repeat(3, 1)


@around(
    "sglang.srt.managers.mm_utils:prepare_mm_inputs",
    why="SGLang keeps what a target reads of images for EAGLE only; its layers write over it",
    until="it asks the algorithm",
)
def _kept_images(original: Any, input_ids: Any, forward_batch: Any, *args: Any, **named: Any) -> Any:
    """Keep a prefill's `mm_input_embeds` [T, H], the rows of text and images that the first layer reads."""
    read = original(input_ids, forward_batch, *args, **named)
    if forward_batch.mm_input_embeds is not None:
        forward_batch.mm_input_embeds = forward_batch.mm_input_embeds.clone()
    return read
