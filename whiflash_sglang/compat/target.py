"""The target model as the worker sees it: one capture, a prefill, a packed verification."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout
from whiflash_kernels import MixedBlock

from whiflash_sglang.checkpoints import TargetShape
from whiflash_sglang.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Verified:
    """One verification forward of T packed rows.

    logits: [T, V], the target's raw logits. features: [T, F], captured layer outputs.
    final_hidden: [T, H] after the final norm, None unless it was asked for. output: SGLang's own record, which
    carries log-probabilities back to the scheduler.
    """

    logits: torch.Tensor
    features: torch.Tensor
    final_hidden: torch.Tensor | None
    output: Any
    can_run_cuda_graph: bool


class Target:
    """Wraps the target's worker. Raises CheckpointError where the model cannot capture what drafters need."""

    def __init__(self, target_worker: Any) -> None:
        self.worker = target_worker
        self.runner = target_worker.model_runner
        self.model = self.runner.model
        config = target_worker.model_config.hf_text_config
        self.shape = TargetShape(config.hidden_size, config.num_hidden_layers, config.vocab_size)
        self.context_len = int(target_worker.model_config.context_len)
        self.dtype: torch.dtype = self.runner.dtype
        self.device = torch.device(self.runner.device)

    @property
    def embedding(self) -> torch.Tensor:
        """[V, H] input embedding, without padding rows."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight[: self.shape.vocab_size]

    @property
    def lm_head(self) -> torch.Tensor:
        """[V, H] output projection, without padding rows."""
        weight: torch.Tensor = self.model.lm_head.weight
        return weight[: self.shape.vocab_size]

    @property
    def slot_table(self) -> torch.Tensor:
        """[request rows, ctx] int32: request row and position → KV slot."""
        table: torch.Tensor = self.runner.req_to_token_pool.req_to_token
        return table

    @property
    def kv_slots(self) -> int:
        """Slots of the target's KV pool, the padding page included."""
        pool = self.runner.token_to_kv_pool
        return int(pool.size) + int(pool.page_size)

    def capture(self, layers: Sequence[int], *, final_hidden: bool) -> None:
        """Capture the outputs of `layers` (ascending) in every forward that asks for hidden states.

        Upstream's two setters write one list and the second would overwrite the first, so the union is set once.
        """
        setter = getattr(self.model, "set_dflash_layers_to_capture", None) or getattr(
            self.model, "set_eagle3_layers_to_capture", None
        )
        if setter is None:
            raise CheckpointError(
                f"{type(self.model).__name__} has no hidden-state capture in SGLang, so neither drafter can read it"
            )
        setter(list(layers))
        if final_hidden:
            self.model.logits_processor.keep_last_hidden_states = True

    def prefill(self, batch: Any) -> Any:
        """Target forward and first token of an extend batch; `.logits_output.hidden_states` is [tokens, F]."""
        result = self.worker.forward_batch_generation(batch, capture_hidden_mode=CaptureHiddenMode.FULL)
        result.logits_output.last_hidden_states = None  # nothing reads a prompt's
        return result

    def verify(self, batch: Any, block: MixedBlock, widths: Sequence[int]) -> Verified:
        """One forward over the packed rows of all requests (design: a narrow row costs what it is wide)."""
        verify_input = DFlashVerifyInput(
            draft_token=block.input_ids,
            positions=block.positions,
            draft_token_num=max(widths),
            capture_hidden_mode=CaptureHiddenMode.FULL,
            ragged_verify_layout=_layout(block, widths),
        )
        batch.out_cache_loc = block.cache_slots
        forward_batch, _ = verify_input.prepare_for_verify(batch, self.worker)
        result = self.worker.forward_batch_generation(batch=None, forward_batch=forward_batch, is_verify=True)
        output = result.logits_output
        features, output.hidden_states = output.hidden_states, None
        final_hidden, output.last_hidden_states = output.last_hidden_states, None
        return Verified(output.next_token_logits, features, final_hidden, output, result.can_run_cuda_graph)


def _layout(block: MixedBlock, widths: Sequence[int]) -> RaggedVerifyLayout | None:
    """Ragged rows where widths differ; upstream builds this with Triton kernels only."""
    if min(widths) == max(widths):
        return None
    device = block.input_ids.device
    lens = torch.tensor(widths, dtype=torch.int32, device=device)
    return RaggedVerifyLayout(
        verify_lens=lens,
        graph_num_tokens=sum(widths),
        extend_start_loc=block.qo_indptr[:-1],
        qo_indptr_device=block.qo_indptr,
        verify_lens_cpu=list(widths),
        total_verify_tokens=sum(widths),
    )
