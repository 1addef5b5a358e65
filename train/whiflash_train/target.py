"""Run a target in transformers: drafters copy its layers, `whiflash learn` reads its states, benchmarks its logits."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whiflash_sglang.files.jsonl import read_json_file
from whiflash_sglang.formats.checkpoint import attention_shape
from whiflash_sglang.formats.layers import rope_parameters

_SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def unknown(path: Path) -> str | None:
    """Return why drafters cannot copy layers of the target in the directory `path`; None if they can."""
    config = read_json_file(path / "config.json", finite=False)
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in _SUPPORTED:
        return f"it is a {architecture}, and not one of {', '.join(_SUPPORTED)}"
    return "it is quantised" if config.get("quantization_config") else None


class TargetOutput(NamedTuple):
    """States of a text. `features` [T, captured, H]: outputs of layers. `final` [T, H]: after the final norm."""

    features: Tensor
    final: Tensor


class TargetModel:
    """Inference-only target: one forward over a whole text, without a cache.

    Attributes: `embedding` [V, H], `head` [V, H] (the same tensor if tied), `config` the checkpoint's `config.json`,
    `layers` transformers' modules. New drafters begin from it (`Origin`) if `unknown` returns None.
    """

    embedding_scale = 1.0

    def __init__(self, path: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load a Hugging Face directory without running code from it.

        Raises:
            ValueError: it is quantised (transformers may read values without their scales), or tensors are missing
                (transformers draws them at random), or transformers does not know it.
            ImportError, OSError: transformers cannot load it.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # transformers' bar would overwrite ours
        self.config: dict[str, Any] = read_json_file(path / "config.json", finite=False)
        if self.config.get("quantization_config"):
            raise ValueError(f"the target in {path} is quantised; only one in full precision is read here")
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        if lost := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
            raise ValueError(f"the target in {path} lacks tensors, or they have other shapes: {', '.join(lost[:4])}")
        self._model = model.to(device).eval()
        shape = model.config.get_text_config()
        self.hidden_size, self.num_layers = int(shape.hidden_size), int(shape.num_hidden_layers)
        self.vocab_size = int(shape.vocab_size)
        self.device, self.dtype = device, dtype
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.embedding: Tensor = embedding.detach()
        self.head: Tensor = self.embedding if head is embedding else head.detach()
        self.layers: Sequence[Any] = ()
        if unknown(path) is None:
            self.layers, self.final_norm = model.model.layers, model.model.norm.weight.detach()
            self.attention_shape = attention_shape(self.config, path)
            self.intermediate_size = int(shape.intermediate_size)
            self.rope = rope_parameters(self.config)
            self.max_positions, self.eps = int(shape.max_position_embeddings), float(shape.rms_norm_eps)

    @torch.inference_mode()
    def forward(self, text: Sequence[int] | Tensor, capture: Sequence[int] = ()) -> TargetOutput:
        """Run a text [T]; returns the outputs of the layers in `capture`, and the final states."""
        kept: dict[int, Tensor] = {}

        def keep(index: int, _: Any, __: Any, output: Any) -> None:
            kept[index] = (output[0] if isinstance(output, tuple) else output)[0]

        hooks = [self.layers[index].register_forward_hook(partial(keep, index)) for index in set(capture)]
        try:
            tokens = torch.as_tensor(text, device=self.device)
            final = self._model.base_model(tokens[None], use_cache=False).last_hidden_state[0]
        finally:
            for hook in hooks:
                hook.remove()
        empty = final.new_empty(len(text), 0, self.hidden_size)
        return TargetOutput(torch.stack([kept[index] for index in capture], dim=1) if capture else empty, final)

    def states(self, text: Sequence[int], capture: Sequence[int]) -> Tensor:
        """Return a text's states in the form of `FeatureStore`: [T, captured + 1, H], the final states last."""
        output = self.forward(text, capture)
        return torch.cat([output.features, output.final[:, None]], dim=1)

    @torch.inference_mode()
    def next_logits(self, text: Sequence[int] | Tensor) -> Tensor:
        """Return the logits [V] float32 of the token after a text."""
        tokens = torch.as_tensor(text, device=self.device)
        logits: Tensor = self._model(tokens[None], use_cache=False, logits_to_keep=1).logits
        return logits[0, -1].float()
