"""Run the target's forward under an adapter of its own, for the arm UNO.

SGLang's LoRA wraps the target's layers. Only this forward gives it rows; in any other the layers find none and are the
target's own, captured or not. This forward is not captured: a graph of every size would be kept a second time.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from sglang.srt.lora.backend.triton_backend import TritonLoRABackend
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.engine.forward.lora import require_plain_layers
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.uno import read_adapter
from whiflash_sglang.records.core import DraftBatch

NAME = "whiflash_uno"  # nobody can ask for it: SGLang's registry has adapters of `--lora-paths` only


class AdaptedTarget:
    """The target, with UNO's adapter for noise tokens. config: the adapter's. vocabulary: number of token ids.

    Raises:
        CheckpointError: the adapter's tensors do not fit the target. ConfigError: it changes experts.
    """

    def __init__(self, target: Target, path: Path) -> None:
        self.config, self.vocabulary = read_adapter(path), target.shape.vocab_size
        self.target, runner, self._id = target, target.runner, LoRARef.deterministic_id(NAME, str(path))
        try:
            self._manager = LoRAManager(
                base_model=target.model,
                base_hf_config=runner.model_config.hf_config,
                max_loras_per_batch=2,  # the target without an adapter counts as one
                load_config=runner.load_config,
                dtype=target.dtype,
                server_args=runner.server_args,
                lora_backend="triton" if target.device.type == "cuda" else "torch_native",
                lora_paths=[LoRARef(lora_id=self._id, lora_name=NAME, lora_path=str(path), pinned=True)],
            )
            self._manager.fetch_new_loras({None, self._id})
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the adapter {path} does not fit the target ({error!s:.300}); give the target's own, or remove it"
            ) from error
        require_plain_layers(self._manager)

    def logits(self, batch: DraftBatch, noise: torch.Tensor) -> torch.Tensor:
        """Return logits [B * (1 + D), V] of the bonus token and, with the adapter, of `noise` [B, D] int64.

        Positions are clamped to the context, where a target's table of rotations may end.
        """
        target, size, width = self.target, len(batch), 1 + noise.shape[1]
        widths = torch.full((size,), width, dtype=torch.int32, device=target.device)
        requests = batch.bonus, noise, widths, batch.starts, batch.rows
        block = prepare_mixed_block(*requests, batch.slot_table, rows=size * width)
        block = block._replace(positions=block.positions.clamp(max=target.context_len - 1))
        bounds, runner = torch.full((size,), batch.longest), target.runner
        unknown = target.batch_of(batch.rows, batch.starts, bounds)
        graphs, runner.decode_cuda_graph_runner = runner.decode_cuda_graph_runner, None
        try:
            self._lay_out(size, width - 1)
            output = target.forward(unknown, block, widths, width).logits_output
        finally:
            runner.decode_cuda_graph_runner = graphs
            self._manager.reset_lora_batch()
        logits: torch.Tensor = output.next_token_logits
        return logits

    def _lay_out(self, requests: int, noise: int) -> None:
        """Have SGLang apply the adapter to the `noise` rows after each request's first row."""
        ids, lengths = ([None, self._id] * requests, [1, noise] * requests) if noise else ([None], [requests])
        if isinstance(self._manager.lora_backend, TritonLoRABackend):
            self._manager.prepare_lora_token_segments(lora_ids=ids, segment_lens=lengths)
            return
        # A prefill of as many tokens of as many requests has the same layout.
        rows = SimpleNamespace(lora_ids=ids, batch_size=len(ids), spec_info=None, extend_seq_lens_cpu=lengths)
        rows.forward_mode, rows.extend_seq_lens = ForwardMode.EXTEND, torch.tensor(lengths, dtype=torch.int32)
        self._manager.prepare_lora_batch(rows)
