"""Give rows of a verification, by its requests' widths, the target's LoRA adapters; drafters have no adapters.

SGLang lays a verification's rows out for one width, so rows of a request would meet its neighbour's adapter. Here a
segment has a request's rows of the layout. `triton` (CUDA) reads it on the device: an eager forward from the round's
layout, a captured one from the graph's, which `fill_slots` writes for every replay. No width comes to the host.
`torch_native` (CPU) loops over segments on the host. `csgmv` sorts rows by adapter on the host, and is refused.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from sglang.srt.lora.backend.triton_backend import TritonLoRABackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_spec

from whiflash_sglang.engine.patching import around
from whiflash_sglang.errors import ConfigError


def require_plain_layers(manager: Any) -> None:
    """Raise ConfigError if adapters change experts, whose rows SGLang sorts by counts of one width."""
    if manager is not None and manager.lora_backend.is_moe_lora:
        raise ConfigError(
            "adapters of experts are untested with WHIFLASH; give --lora-target-modules without gate_up_proj and "
            "down_proj"
        )


@around(
    "sglang.srt.lora.lora_manager:LoRAManager.prepare_lora_batch",
    params=("forward_batch",),
    why="SGLang lays rows of adapters out for one width",
    until="it asks the layout",
)
def _by_layout(original: Any, self: Any, forward_batch: Any) -> None:
    """Give each request's rows of a verification to its adapter, as one segment."""
    layout = getattr(forward_batch.spec_info, "ragged_verify_layout", None)
    requests = forward_batch.batch_size
    if layout is None:
        original(self, forward_batch)
        return
    # Batches that are timed at the start have rows but no requests.
    lora_ids = [*forward_batch.lora_ids, *[None] * (requests - len(forward_batch.lora_ids))]
    seen = SimpleNamespace(lora_ids=lora_ids, batch_size=requests)
    if not isinstance(self.lora_backend, TritonLoRABackend):
        # A prefill of as many tokens of each request has the same layout.
        seen.forward_mode, seen.spec_info = ForwardMode.EXTEND, None
        seen.extend_seq_lens, seen.extend_seq_lens_cpu = layout.verify_lens, layout.verify_lens.tolist()
        original(self, seen)
        return
    widest = int(get_spec().speculative_num_draft_tokens)
    seen.forward_mode = forward_batch.forward_mode
    seen.spec_info = SimpleNamespace(draft_token_num=widest)
    original(self, seen)
    self.lora_backend.batch_info = replace(
        self.lora_backend.batch_info,
        seg_lens=layout.verify_lens,
        seg_indptr=layout.qo_indptr_device,
        max_len=widest,
        expected_tokens=layout.graph_num_tokens,
    )
