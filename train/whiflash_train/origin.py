"""Read the parts of a target with which its drafters begin: embedding, head, sizes, and layers to copy."""

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
"""File that SGLang's scheduler writes beside the matrices (`whiflash_train/engine/recorder.py`)."""


def vocabulary_file(directory: Path, rank: int) -> Path:
    """Return the file with the rows of embedding and head that SGLang's process `rank` holds."""
    return directory / f"vocabulary-{rank}.safetensors"


class VocabularyMatrices(NamedTuple):
    """A target's matrices. embedding, head: [V, H]. embedding_scale: the target's factor of its embeddings."""

    embedding: Tensor
    head: Tensor
    embedding_scale: float

    @classmethod
    def read(cls, directory: Path, name: str, *, device: torch.device, dtype: torch.dtype) -> "VocabularyMatrices":
        """Read the matrices that SGLang wrote for the target `name`, rows of all its processes joined, onto `device`.

        Raises:
            CheckpointError: SGLang wrote nothing yet, or for another target.
        """
        try:
            facts = read_json_file(directory / ORIGIN)
        except FileNotFoundError:
            raise CheckpointError(
                f"{directory} is missing: run `whiflash train --step data`, or `lab features`, first"
            ) from None
        if facts["target"] != name:
            raise CheckpointError(
                f"{directory} holds what drafters for {facts['target']} begin with, not for {name}: run "
                "`whiflash train --step data` for it, with a `work` of its own"
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
    """A target that only SGLang can run, described by the tensors that SGLang wrote and by its `config.json`.

    If `config.json` does not give the sizes of a drafter's layers (a target with experts or latent attention), the
    training configuration does. The drafter's layers always rotate whole heads by plain RoPE.

    Attributes:
        embedding, head: [V, H]. embedding_scale: the target's factor of its embeddings. final_norm: [H], weights of a
        drafter's last norm. attention_shape, intermediate_size, rope, max_positions, eps: those of a drafter's
        layers. layers: empty, since drafters cannot begin as layers of this target.
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
        cls, target: Path, name: str, told: Path, layers: Mapping[str, int], final_norm: Tensor, dtype: torch.dtype
    ) -> "ServedOrigin":
        """Read a target's embedding and head, which SGLang wrote to `told`, and its sizes from its `config.json`.

        Args:
            target: its directory. name: the configuration's `target`. told: holds the file `ORIGIN`. final_norm: [H].
            layers: a drafter's `num_attention_heads`, `num_key_value_heads`, `head_dim` and `intermediate_size`; they
                replace the target's.

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
"""A target with the parts that new drafters begin with."""


def for_training(target: Origin) -> dict[str, Any]:
    """Return the options that load a drafter of this target for training: on the CPU, in float32."""
    matrices = {"target_embedding": target.embedding.float(), "target_lm_head": target.head.float()}
    return {"device": torch.device("cpu"), "dtype": torch.float32, **matrices}
