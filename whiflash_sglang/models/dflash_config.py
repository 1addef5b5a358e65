"""What a DFlash checkpoint's `config.json` says, read and written in the `DFlashDraftModel` format."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import attention_shape, integer, read_config_of
from whiflash_sglang.models.layers import AttentionShape
from whiflash_sglang.models.rope import rope_parameters

ARCHITECTURE = "DFlashDraftModel"
_PLAIN_VALUES = {
    "projector_type": (None, "dflash"),
    "conv_kernel_size": (None, 0),
    "selector_rank": (None, 0),
    "output_multiplier": (None, 1.0),
    "final_logit_softcapping": (None, 0.0),
    "attention_sink_bias": (None, False),
    "attention_value_scale": (None, 1.0),
    "attention_bias": (None, False),
    "use_gemma_norm": (None, False),
    "rope_is_neox_style": (None, True),
    "partial_rotary_factor": (None, 1.0),
    "is_causal": (None, False),
    "hidden_act": (None, "silu"),
}
"""Settings of later DFlash variants, and the values at which they mean the published model."""


@dataclass(frozen=True, slots=True)
class DFlashConfig:
    """Sizes of a checkpoint.

    Attributes:
        block_size: tokens of a block, the bonus token included.
        target_layer_ids: target layers whose outputs are concatenated, in this order.
        mask_token_id: the token that stands at the positions to be drafted.
    """

    hidden_size: int
    intermediate_size: int
    attention: AttentionShape
    num_layers: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    rope: dict[str, Any]
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5

    @classmethod
    def read(cls, path: Path) -> "DFlashConfig":
        """Parse `config.json`. Raises `CheckpointError` naming the field that does not fit."""
        config = read_config_of(path, ARCHITECTURE)
        dflash = config.get("dflash_config") or {}
        _refuse_variants(path, {**config, **dflash})
        vocab = integer(config, "vocab_size", path)
        layers = integer({**config, **dflash}, "num_target_layers", path)
        parsed = cls(
            hidden_size=integer(config, "hidden_size", path),
            intermediate_size=integer(config, "intermediate_size", path),
            attention=attention_shape(config, path),
            num_layers=integer(config, "num_hidden_layers", path),
            vocab_size=vocab,
            block_size=integer({**config, **dflash}, "block_size", path, minimum=2),
            mask_token_id=integer({**config, **dflash}, "mask_token_id", path, minimum=0),
            target_layer_ids=_target_layers(path, {**config, **dflash}, layers),
            num_target_layers=layers,
            rope=rope_parameters(config),
            max_position_embeddings=integer(config, "max_position_embeddings", path, default=32768),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        )
        if parsed.mask_token_id >= vocab:
            raise CheckpointError(
                f"{path}/config.json: mask_token_id {parsed.mask_token_id} is not among {vocab} tokens"
            )
        return parsed

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that SGLang reads."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.attention.heads,
            "num_key_value_heads": self.attention.kv_heads,
            "head_dim": self.attention.head_dim,
            "num_hidden_layers": self.num_layers,
            "layer_types": ["full_attention"] * self.num_layers,
            "vocab_size": self.vocab_size,
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
            },
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope["rope_theta"],
            "rope_scaling": None if self.rope["rope_type"] == "default" else self.rope,
            "torch_dtype": "bfloat16",
        }


def _refuse_variants(path: Path, settings: Mapping[str, Any]) -> None:
    for key, plain in _PLAIN_VALUES.items():
        if settings.get(key) not in plain:
            raise CheckpointError(
                f"{path}/config.json: {key} {settings[key]!r} belongs to a DFlash variant that is not "
                f"supported (supported: {plain[-1]!r})"
            )
    kinds = set(settings.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise CheckpointError(
            f"{path}/config.json: layer_types {sorted(kinds)} are not supported, only full_attention "
            "(sliding-window drafters need a windowed cache)"
        )


def _target_layers(path: Path, settings: Mapping[str, Any], num_target_layers: int) -> tuple[int, ...]:
    layers = settings.get("target_layer_ids")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
        raise CheckpointError(
            f"{path}/config.json: dflash_config.target_layer_ids must be a list of layer numbers, "
            f"got {layers!r}"
        )
    wrong = [layer for layer in layers if not 0 <= layer < num_target_layers]
    if wrong:
        raise CheckpointError(
            f"{path}/config.json: dflash_config.target_layer_ids names layers {wrong}; "
            f"the target has layers 0 to {num_target_layers - 1}"
        )
    return tuple(layers)
