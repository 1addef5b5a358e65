"""What a target's `config.json` says of its own next-token head (multi-token prediction)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import attention_shape, integer
from whiflash_sglang.models.experts import Routed, read_routed
from whiflash_sglang.models.latent import LatentShape, read_latent
from whiflash_sglang.models.layers import AttentionShape
from whiflash_sglang.models.rope import rope_parameters

COUNT = "num_nextn_predict_layers"


class Names(NamedTuple):
    """Tensors of a head beside its decoder layer, behind the head's prefix. hidden_first: the projection reads the
    target's state before the embedding.
    """

    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str
    hidden_first: bool


DEEPSEEK = Names("enorm", "hnorm", "eh_proj", "shared_head.norm", hidden_first=False)
MIMO = Names("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm", hidden_first=True)


@dataclass(frozen=True, slots=True)
class MTPConfig:
    """Sizes and variants of a head.

    Attributes:
        prefix: what its tensors' names begin with in the target's files.
        attention: heads of what its KV keeps; latent: where that is a latent of keys and values (MLA).
        routed: its experts; None where `intermediate_size` is that of one network.
        head_norms: queries and keys are normed. blank_first: at position 0 no embedding is read.
    """

    prefix: str
    names: Names
    hidden_size: int
    intermediate_size: int
    attention: AttentionShape
    routed: Routed | None
    vocab_size: int
    rope: dict[str, Any]
    max_position_embeddings: int
    rms_norm_eps: float
    latent: LatentShape | None = None
    attention_bias: bool = False
    head_norms: bool = False
    blank_first: bool = False

    @property
    def target_hidden_size(self) -> int:
        """It is part of the target."""
        return self.hidden_size

    @property
    def num_layers(self) -> int:
        """Decoder layers, each with K/V of its own."""
        return 1

    def layers_of(self, num_target_layers: int) -> tuple[int, ...]:
        """It reads the state behind the final norm, as SGLang hands it to a next-token head."""
        return (num_target_layers,)


def parse_mimo(path: Path, config: Mapping[str, Any]) -> MTPConfig:
    """MiMo's: a Qwen2 layer in `model.mtp_layers`. Raises `CheckpointError` naming the key that does not fit."""
    _check(path, config)
    return MTPConfig(
        prefix="model.mtp_layers.0.",
        names=MIMO,
        intermediate_size=integer(config, "intermediate_size", path),
        routed=None,
        attention=attention_shape(config, path),
        attention_bias=True,
        blank_first=True,
        **_common(path, config),
    )


def parse_glm(path: Path, config: Mapping[str, Any]) -> MTPConfig:
    """GLM-4.5's: one more layer, with experts. Raises `CheckpointError` naming the key that does not fit."""
    _check(path, config)
    rotated = {"partial_rotary_factor": 0.5} | dict(config)
    return MTPConfig(
        prefix=f"model.layers.{integer(config, 'num_hidden_layers', path)}.",
        names=DEEPSEEK,
        intermediate_size=0,
        routed=read_routed(path, config),
        attention=attention_shape(config, path),
        attention_bias=bool(config.get("attention_bias", False)),
        head_norms=bool(config.get("use_qk_norm", False)),
        **_common(path, rotated),
    )


def parse_latent(path: Path, config: Mapping[str, Any]) -> MTPConfig:
    """DeepSeek-V3's and GLM-4.7-Flash's: one more layer, with latent attention and experts.

    Raises `CheckpointError` naming the key that does not fit.
    """
    _check(path, config)
    latent = read_latent(path, config, rope_parameters(config))
    return MTPConfig(
        prefix=f"model.layers.{integer(config, 'num_hidden_layers', path)}.",
        names=DEEPSEEK,
        intermediate_size=0,
        routed=read_routed(path, config),
        attention=latent.kept,
        latent=latent,
        **_common(path, config),
    )


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where the target has no head, several, or one that is not read."""
    count = config.get(COUNT) or 0
    if not count:
        raise CheckpointError(
            f"{path}/config.json: {COUNT} is {config.get(COUNT)}: this target has no next-token head of its own"
        )
    if count != 1:
        raise CheckpointError(
            f"{path}/config.json: {COUNT} is {count}; only one next-token head is supported"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path}/config.json: quantization_config: the next-token head of a quantised target is not supported"
        )


def _common(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": integer(config, "hidden_size", path),
        "vocab_size": integer(config, "vocab_size", path),
        "rope": rope_parameters(config),
        "max_position_embeddings": integer(config, "max_position_embeddings", path, default=32768),
        "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
    }
