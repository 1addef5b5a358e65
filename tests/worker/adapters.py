"""Small adapters (LoRA) of a tiny target, in PEFT's format, and the targets that they make of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_set import Models
from reference import ReferenceDrafters
from safetensors.torch import load_file, save_file
from sglang.srt.lora.lora_registry import LoRARef

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
SCALE = 0.5
"""Scale of its factors: large enough that every text is another one."""


@dataclass(frozen=True)
class Adapter:
    """models: the same drafters, with the target whose weights the adapter has changed."""

    name: str
    path: Path
    models: Models

    @property
    def id(self) -> str:
        """As SGLang makes it of `--lora-paths`."""
        return str(LoRARef.deterministic_id(self.name, str(self.path)))

    @property
    def ref(self) -> LoRARef:
        return LoRARef(lora_id=self.id, lora_name=self.name, lora_path=str(self.path), pinned=False)


def make_adapter(
    models: Models, root: Path, name: str, *, seed: int, rank: int, modules: Sequence[str] = LINEARS
) -> Adapter:
    """Write an adapter of these modules of every layer, and the target that it makes."""
    path, merged, random = root / name, root / f"{name}-merged", torch.Generator().manual_seed(seed)
    path.mkdir(parents=True)
    merged.mkdir()
    weights, factors, alpha = load_file(models.target / "model.safetensors"), {}, 2 * rank
    for weight in sorted(weights):
        module = weight.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules:
            continue
        outputs, inputs = weights[weight].shape
        a, b = (torch.randn(shape, generator=random) for shape in ((rank, inputs), (outputs, rank)))
        a, b = a * SCALE / inputs**0.5, b * SCALE / rank**0.5
        factors |= {f"base_model.model.{module}.lora_{part}.weight": f for part, f in (("A", a), ("B", b))}
        weights[weight] = weights[weight] + alpha / rank * (b @ a)
    save_file(factors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": rank, "lora_alpha": alpha}
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(modules)}))
    for file in models.target.iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    reference = ReferenceDrafters(merged, models.eagle3, models.dflash)
    return Adapter(name, path, Models(merged, models.eagle3, models.dflash, reference))


def serving(*adapters: Adapter, at_once: int = 3) -> dict[str, Any]:
    """Arguments of an engine that begins with these; `at_once`, the target itself among them, fit a batch."""
    return {
        "enable_lora": True,
        "lora_paths": [adapter.ref for adapter in adapters],
        "max_lora_rank": 8,
        "lora_target_modules": list(LINEARS),
        "max_loras_per_batch": at_once,
    }
