"""What an EAGLE-3 checkpoint's `config.json` says, read and written in SGLang's format."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import attention_shape, integer, layer_ids, read_config_of
from whiflash_sglang.models.layers import AttentionShape
from whiflash_sglang.models.rope import rope_parameters

ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Sizes and variants of a checkpoint.

    Attributes:
        target_hidden_size: size of one captured feature; `num_features` of them are concatenated.
        draft_vocab_size: None where the drafter uses the target's own head.
        target_layer_ids: layers whose outputs are captured; empty where SGLang's default is left.
        norm_before_fc: one norm over the concatenation. fc_norm: one norm for each feature.
        norm_output: a draft step feeds back the state after the final norm.
        norm_before_residual: the layer adds to the normed feature, not to the feature. head_norms: queries and keys are
            normed. own_embedding: the file's embedding was trained, so it is used instead of the target's.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    attention: AttentionShape
    num_layers: int
    vocab_size: int
    draft_vocab_size: int | None
    num_features: int
    target_layer_ids: tuple[int, ...]
    rope: dict[str, Any]
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    fc_bias: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    head_norms: bool = False
    attention_bias: bool = False
    own_embedding: bool = False

    @property
    def brings_embedding(self) -> bool:
        """Whether it embeds with a matrix of its file instead of the target's."""
        return self.own_embedding or self.target_hidden_size != self.hidden_size

    @classmethod
    def read(cls, path: Path) -> "Eagle3Config":
        """Parse `config.json`. Raises `CheckpointError` naming the field that does not fit."""
        return parse(path, read_config_of(path, (ARCHITECTURE,)))

    def layers_of(self, num_target_layers: int) -> tuple[int, ...]:
        """Target layers whose outputs are read, for a target of that many.

        SGLang's ids name the layer *before* which the state is captured; its default is [2, L//2, L-3], which are the
        outputs of [1, L//2-1, L-4]. An explicit list in the checkpoint already names outputs (SGLang adds one to each).
        """
        last = num_target_layers
        return self.target_layer_ids or (1, last // 2 - 1, last - 4)

    def to_json(self) -> dict[str, Any]:
        """The `config.json` that SGLang reads. Raises ValueError for variants that it does not know."""
        if self.norm_before_residual or self.head_norms or self.attention_bias or self.own_embedding:
            raise ValueError("only what SGLang loads is written")
        plain = asdict(self)
        for name in ("norm_before_residual", "head_norms", "attention_bias", "own_embedding"):
            del plain[name]
        heads = plain.pop("attention")
        rope = plain.pop("rope")
        layers = list(plain.pop("target_layer_ids"))
        plain["num_hidden_layers"] = plain.pop("num_layers")
        plain["bias"] = plain.pop("fc_bias")
        features = plain.pop("num_features")
        if not layers and features != 3:
            plain["num_aux_hidden_states"] = features
        return {
            **plain,
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": heads[2],
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers} if layers else {},
            "torch_dtype": "bfloat16",
        }


def parse(path: Path, config: Mapping[str, Any]) -> Eagle3Config:
    """A `LlamaForCausalLMEagle3`'s configuration. Raises `CheckpointError` naming the field that does not fit."""
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{path}/config.json: hidden_act {config['hidden_act']!r} is not supported, only silu"
        )
    if config.get("architectures") == ["LlamaForCausalLM"] and not config.get("draft_vocab_size"):
        raise CheckpointError(
            f"{path}/config.json: a LlamaForCausalLM without draft_vocab_size is a target, not an EAGLE-3 drafter"
        )
    if config.get("rope_is_neox_style") is False:
        raise CheckpointError(f"{path}/config.json: rope_is_neox_style false is not supported")
    if config.get("tie_word_embeddings"):
        raise CheckpointError(
            f"{path}/config.json: tie_word_embeddings is not supported for an EAGLE-3 drafter"
        )
    eagle = config.get("eagle_config") or {}
    layers = layer_ids(eagle, LAYERS_KEY, path, "eagle_config.") if eagle.get(LAYERS_KEY) else ()
    draft_vocab = config.get("draft_vocab_size")
    hidden = integer(config, "hidden_size", path)
    return Eagle3Config(
        hidden_size=hidden,
        target_hidden_size=integer(config, "target_hidden_size", path, default=hidden),
        intermediate_size=integer(config, "intermediate_size", path),
        attention=attention_shape(config, path),
        num_layers=integer(config, "num_hidden_layers", path),
        vocab_size=integer(config, "vocab_size", path),
        draft_vocab_size=None if draft_vocab is None else integer(config, "draft_vocab_size", path),
        num_features=integer(config, "num_aux_hidden_states", path, default=len(layers) or 3),
        target_layer_ids=layers,
        rope=rope_parameters(config),
        max_position_embeddings=integer(config, "max_position_embeddings", path, default=8192),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        fc_bias=bool(config.get("bias", False)),
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm", False)),
        norm_output=bool(config.get("norm_output", False)),
    )


def parse_deepspec(path: Path, config: Mapping[str, Any]) -> Eagle3Config:
    """DeepSpec's `Qwen3Eagle3Model`: Qwen3's head norms, features named at the top level, a head over the whole
    vocabulary. Raises `CheckpointError` naming the field that does not fit.
    """
    layers = layer_ids(config, "target_layer_ids", path)
    read = parse(path, {**config, "draft_vocab_size": config.get("vocab_size"), "tie_word_embeddings": False})
    check_one_layer(path, read)
    return replace(
        read,
        target_layer_ids=layers,
        num_features=len(layers),
        head_norms=True,
        attention_bias=bool(config.get("attention_bias", False)),
    )


def check_one_layer(path: Path, config: Eagle3Config) -> None:
    """Raise CheckpointError for several layers in a format whose upper layers no code that is at hand defines."""
    if config.num_layers != 1:
        raise CheckpointError(
            f"{path}/config.json: num_hidden_layers {config.num_layers}: several layers of EAGLE-3 are read from a "
            f"{ARCHITECTURE} only"
        )
