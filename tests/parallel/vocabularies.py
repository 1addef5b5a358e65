"""Targets whose embedding and head are quantised, or one matrix: checkpoints, and what a rank finds with them.

The quantisation is a stand-in, since all of SGLang's that reach a head need an accelerator: weights of a row are small
whole numbers times one step. It goes SGLang's way, from the checkpoint's file to the logits processor.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from engine import engine
from safetensors.torch import load_file, save_file
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.utils import set_weight_attrs
from tensor_parallel import Checkpoints, Outputs, of_rank
from tiny_models import HIDDEN
from torch import Tensor
from torch.nn import Parameter
from traffic import Arrival, play

from whiflash_sglang.formats.choice import Choice

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = torch.arange(0, 320, 7)


class SteppedMethod(QuantizeMethodBase):  # type: ignore[misc]
    """weight [V, H] int8, step [V, 1] float: a row is its weights times its step."""

    def create_weights(
        self, layer: Any, inputs: int, outputs: list[int], *_: Any, params_dtype: torch.dtype, **attributes: Any
    ) -> None:
        weight = Parameter(torch.empty(sum(outputs), inputs, dtype=torch.int8), requires_grad=False)
        step = Parameter(torch.empty(sum(outputs), 1, dtype=params_dtype), requires_grad=False)
        for name, parameter in (("weight", weight), ("step", step)):
            set_weight_attrs(parameter, {"output_dim": 0, **attributes})
            layer.register_parameter(name, parameter)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight * layer.step, bias)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        found: Tensor = layer.weight[ids] * layer.step[ids]
        return found


class Stepped(QuantizationConfig):  # type: ignore[misc]
    """Quantisation of embeddings and heads; layers stay as they are."""

    def get_name(self) -> str:
        return "stepped"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Stepped":
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding):
            return SteppedMethod()
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_scaled_act_names(self) -> list[str]:
        return []


def rewritten(source: Path, path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """The checkpoint `source` with other tensors; a field of its configuration that is None is left out."""
    shutil.copytree(source, path)
    save_file(tensors, path / "model.safetensors")
    fields = json.loads((source / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return path


def stepped(source: Path, path: Path) -> Path:
    """Quantised. Its values without the quantisation are in `path.with_suffix(".plain")`."""
    packed = load_file(source / "model.safetensors")
    plain = dict(packed)
    for name in (EMBEDDING, HEAD):
        # Powers of two: products with small whole numbers are exact.
        step = (packed[name].abs().amax(1, keepdim=True) / 127).log2().ceil().exp2()
        packed[name] = (packed[name] / step).round().to(torch.int8)
        packed[name.replace("weight", "step")] = step
        plain[name] = packed[name] * step
    rewritten(source, path.with_suffix(".plain"), plain)
    return rewritten(source, path, packed, quantization_config={"quant_method": "stepped"})


def tied(source: Path, path: Path) -> Path:
    """The embedding is the head, too."""
    tensors = load_file(source / "model.safetensors")
    tensors[EMBEDDING] = tensors.pop(HEAD)
    return rewritten(source, path, tensors, tie_word_embeddings=True)


def without_head(source: Path, path: Path) -> Path:
    """An EAGLE-3 drafter that borrows the target's."""
    tensors = load_file(source / "model.safetensors")
    for name in (HEAD, "d2t", "t2d"):
        del tensors[name]
    return rewritten(source, path, tensors, draft_vocab_size=None)


@dataclass(frozen=True)
class Found:
    """Results of a rank. embedded: `TOKENS`. choices: of `states`, by arm. accepted: drafts."""

    outputs: Outputs
    embedded: Tensor
    choices: dict[str, Choice]
    accepted: int


def states() -> Tensor:
    """States that drafters choose for, [64, H]."""
    return torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(5))


def find(checkpoints: Checkpoints, arrivals: list[Arrival], size: int, rank: int, port: int) -> Found:
    with (
        patch.dict(QUANTIZATION_METHODS, {"stepped": Stepped}),
        engine(checkpoints.target, whiflash=checkpoints.whiflash("random"), **of_rank(rank, port, tp_size=size)) as e,
    ):
        models = {arm: e.worker.drafters[arm].model for arm in ("ar", "diffusion")}
        choices = {arm: model.head.choose(model.head.logits(states())) for arm, model in models.items()}
        embedded = models["ar"].embed(TOKENS)
        outputs = play(e, arrivals)
        accepted = sum(req.spec_num_correct_drafts for req in e.requests.values())
        return Found(outputs, embedded.clone(), choices, accepted)
