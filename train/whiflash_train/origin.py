"""Parts that drafters take over from a target: the vocabulary that they share, sizes, and layers to begin as."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.files.jsonl import read_json_file
from whiflash_sglang.formats.checkpoint import attention_shape, integer, number
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_sglang.formats.draft_format import merged
from whiflash_sglang.formats.layers import AttentionShape, rope_parameters
from whiflash_train.target import TargetModel

ORIGIN = "target.json"
"""File of a directory that SGLang's scheduler wrote (`whiflash_train/engine/recorder.py`)."""


def vocabulary_file(directory: Path, rank: int) -> Path:
    """Rows of embedding and head that one of SGLang's processes had."""
    return directory / f"vocabulary-{rank}.safetensors"


class VocabularyMatrices(NamedTuple):
    """embedding, head: [V, H]. embedding_scale: what the target multiplies rows of its embedding by."""

    embedding: Tensor
    head: Tensor
    embedding_scale: float

    @classmethod
    def read(
        cls, directory: Path, name: str, *, device: torch.device, dtype: torch.dtype
    ) -> "VocabularyMatrices":
        """The tensors that SGLang wrote for the target of that name, on `device`: the rows of all processes together.

        Raises:
            CheckpointError: it wrote nothing yet, or for another target.
        """
        try:
            facts = read_json_file(directory / ORIGIN)
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} is missing: run `whiflash train --step data`, or `lab features`, first"
            ) from None
        if facts["target"] != name:
            raise CheckpointError(
                f"{directory} holds what drafters for {facts['target']} begin with, not for {name}: run `whiflash "
                "train data` for it, with a `work` of its own"
            )
        parts: dict[str, list[Tensor]] = {"embedding": [], "head": []}
        for rank in range(facts["ranks"]):
            with safe_open(vocabulary_file(directory, rank), framework="pt") as file:
                for key, rows in parts.items():
                    rows.append(file.get_tensor(key).to(dtype))
        embedding, head = (torch.cat(rows).to(device) for rows in parts.values())
        return cls(embedding, head, float(facts["embedding_scale"]))


@dataclass
class ServedOrigin:
    """A target that only SGLang knows: the tensors that it wrote, and its `config.json`.

    If that does not give the shape of a drafter's layers (a target of experts or of latent attention), the training
    configuration does. They rotate whole heads by plain RoPE, whatever the target does.

    Attributes:
        embedding, head: [V, H]. embedding_scale: what the target multiplies rows of its embedding by. final_norm: [H],
        weights of a drafter's last norm. attention_shape, intermediate_size, rope, max_positions, eps: those of a
        drafter's layers. layers: none of the target's own are known, for drafters to begin as.
    """

    embedding: Tensor
    embedding_scale: float
    head: Tensor
    final_norm: Tensor
    hidden_size: int
    vocab_size: int
    num_layers: int
    attention_shape: AttentionShape
    intermediate_size: int
    rope: dict[str, Any]
    max_positions: int
    eps: float
    layers: Sequence[Any] = field(default=())

    @classmethod
    def read(
        cls,
        target: Path,
        name: str,
        told: Path,
        layers: Mapping[str, int],
        final_norm: Tensor,
        dtype: torch.dtype,
    ) -> "ServedOrigin":
        """Args:
            target: its directory. name: in the configuration. told: directory of `ORIGIN`.
            layers: `num_attention_heads`, `num_key_value_heads`, `head_dim` and `intermediate_size` of a drafter, in
                the place of the target's own. final_norm: [H].

        Raises:
            CheckpointError: something is missing, or does not fit the target.
        """
        config = {**merged(target, read_json_config(target), "text_config"), **layers}
        embedding, head, scale = VocabularyMatrices.read(told, name, device=torch.device("cpu"), dtype=dtype)
        hidden, vocab = (integer(config, key, target) for key in ("hidden_size", "vocab_size"))
        for tensor_name, matrix in (("embedding", embedding), ("head", head)):
            if matrix.shape != (vocab, hidden):
                raise CheckpointError(
                    f"{told} holds a target's {tensor_name} of {list(matrix.shape)}, {target}/config.json says "
                    f"{[vocab, hidden]}: run `whiflash train --step data` for this target first"
                )
        return cls(
            embedding,
            scale,
            head,
            final_norm.to(dtype),
            hidden,
            vocab,
            integer(config, "num_hidden_layers", target),
            attention_shape(config, target),
            integer(config, "intermediate_size", target),
            {"rope_type": "default", "rope_theta": rope_parameters(config)["rope_theta"]},
            integer(config, "max_position_embeddings", target, default=32768),
            number(config, "rms_norm_eps", target, default=1e-6),
        )


Origin = TargetModel | ServedOrigin
"""A target, as drafters begin from it."""


def for_training(target: Origin) -> dict[str, Any]:
    """Options with which a checkpoint for this target is loaded: on the CPU, in float32."""
    matrices = {"target_embedding": target.embedding.float(), "target_lm_head": target.head.float()}
    return {"device": torch.device("cpu"), "dtype": torch.float32, **matrices}
