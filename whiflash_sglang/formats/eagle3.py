"""The EAGLE-3 drafter (arXiv 2503.01840) in SGLang's checkpoint format, without SGLang.

A decoder layer whose QKV input is [norm(embedding of the next token); norm(fused target feature)], and in some
checkpoints more layers on top of it. Entry p of their caches pairs the embedding of token p+1 with the target's feature
at p, at RoPE position p; a later draft step feeds back the last layer's state before the final norm. Numerics follow
`sglang/srt/models/llama_eagle3.py` of SGLang 0.5.23.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.checkpoint import (
    Unfilled,
    WeightReader,
    attention_shape,
    attention_weights,
    integer,
    layer_ids,
    mlp_weights,
    read_weights,
    write_checkpoint,
)
from whiflash_sglang.formats.choice import Choice, DraftHead, SharedVocabulary, borrowed_head
from whiflash_sglang.formats.config_json import read_config_of
from whiflash_sglang.formats.draft_format import DraftFormat
from whiflash_sglang.formats.layers import (
    Angles,
    Attend,
    Attention,
    AttentionShape,
    RMSNorm,
    Rotary,
    SwiGLU,
    rope_parameters,
)
from whiflash_sglang.formats.packed import Linear

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
    """Raise CheckpointError for several layers in a format whose upper layers no public code defines."""
    if config.num_layers != 1:
        raise CheckpointError(
            f"{path}/config.json: num_hidden_layers {config.num_layers}: several layers of EAGLE-3 are read from a "
            f"{ARCHITECTURE} only"
        )


_NAMES = {f"aux_norm_{place}.weight": f"fc_norm.{i}.weight" for i, place in enumerate(("low", "mid", "high"))}
"""Tensor names of earlier files."""


class _Layer(nn.Module):
    def __init__(self, config: Eagle3Config, first: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(size, eps) if first else None
        self.hidden_norm = RMSNorm(size, eps)
        self.attention = Attention(
            2 * size if first else size,
            size,
            config.attention,
            head_norm_eps=eps if config.head_norms else None,
            bias=config.attention_bias,
        )
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = SwiGLU(size, config.intermediate_size)

    def forward(
        self, residual: Tensor, entry: Tensor, angles: Angles, index: int, attend: Attend, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """`residual` [T, H] and what attention reads [T, H or 2H] → the new residual, and its `norm`, [T, H] each."""
        # The caller may need the residual that it handed in; this one is ours to give up.
        residual = residual + self.attention(entry, angles, index, attend)
        return norm.add(residual, self.mlp(self.mlp_norm(residual)))


class Eagle3Drafter(nn.Module):
    """An EAGLE-3 chain drafter.

    Attributes:
        target_embedding: [V, H], the target's, not part of the checkpoint.
        d2t: [draft_vocab] int64 offsets, target id = d2t[i] + i; None where the vocabularies are the same.
    """

    target_embedding: Tensor
    target_lm_head: Tensor
    d2t: Tensor | None
    shared: SharedVocabulary | None = None
    """The target's parts if its vocabulary is split or quantised: two matrices hold this process's rows, or none."""

    def __init__(
        self, config: Eagle3Config, target_embedding: Tensor, target_lm_head: Tensor | None = None
    ) -> None:
        """Untrained. `target_lm_head` [V, H] serves where `draft_vocab_size` is None."""
        super().__init__()
        self.config = config
        eps = config.rms_norm_eps
        width = config.num_features * config.target_hidden_size
        self.input_norm = RMSNorm(width, eps) if config.norm_before_fc else None
        norms = config.num_features if config.fc_norm else 0
        self.fc_norm = nn.ModuleList(RMSNorm(config.target_hidden_size, eps) for _ in range(norms))
        self.fc = Linear(width, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList(_Layer(config, first=index == 0) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps)
        self.rotary = Rotary(config.rope, config.attention.head_dim, config.max_position_embeddings)
        self.register_buffer("target_embedding", target_embedding, persistent=False)
        if config.draft_vocab_size is None:
            if target_lm_head is None:
                raise CheckpointError(
                    "this EAGLE-3 drafter has no head of its own; the target's must be handed in"
                )
            self.lm_head = None
            self.register_buffer("target_lm_head", target_lm_head, persistent=False)
            self.register_buffer("d2t", None)
        else:
            self.lm_head = Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

    @property
    def num_layers(self) -> int:
        """Decoder layers, each with K/V of its own."""
        return self.config.num_layers

    @property
    def draft_vocab_size(self) -> int:
        """Rows of the head that drafts."""
        return self.config.draft_vocab_size or self.config.vocab_size

    def fuse(self, features: Tensor) -> Tensor:
        """`features` [T, num_features · Ht], layers in ascending order → [T, H]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.config.fc_norm:
            chunks = features.chunk(self.config.num_features, dim=-1)
            features = torch.cat(
                [norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1
            )
        fused: Tensor = self.fc(features)
        return fused

    def keys_values(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend | None = None
    ) -> tuple[Tensor, Tensor]:
        """KV-only pass: next-token ids [T], fused features [T, H], positions [T] → k, v of the last layer, [T, Hkv, D].

        They come from what the layers below it put out: those run whole, and `attend` is given their k and v. One layer
        needs no attention. Raises `CheckpointError` for several layers without `attend`.
        """
        if attend is None and self.num_layers > 1:
            raise CheckpointError(
                f"K/V of an EAGLE-3 drafter of {self.num_layers} layers need attention over the text"
            )
        angles = self.rotary.angles(positions)
        _, entry = self._below_last(tokens, hidden, angles, attend)
        last: Any = self.layers[-1]
        keys_values: tuple[Tensor, Tensor] = last.attention.keys_values(entry, angles)
        return keys_values

    def forward(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """One step: next-token ids [T] int64, fused features or fed-back states [T, H], positions [T].

        Returns [T, H] what the chain's next step feeds back, and [T, H] what the head reads.
        """
        angles = self.rotary.angles(positions)
        residual, entry = self._below_last(tokens, hidden, angles, attend)
        last = self.num_layers - 1
        residual, normed = self.layers[last](residual, entry, angles, last, attend, self.norm)
        return normed if self.config.norm_output else residual, normed

    @property
    def head(self) -> DraftHead:
        """The head that it chooses by: its own, or the target's."""
        if self.lm_head is None:
            return borrowed_head(self.target_lm_head, self.shared)
        return DraftHead(self.lm_head.weight, None)

    def logits(self, logits_hidden: Tensor) -> Tensor:
        """[T, H] → [T, draft_vocab], this process's part of it."""
        return self.head.logits(logits_hidden)

    def choose(self, logits_hidden: Tensor) -> Choice:
        """[T, H] → the first choice for each: the target's id, and how sure the drafter is of it."""
        head = self.head
        choice = head.choose(head.logits(logits_hidden))
        return Choice(self.target_ids(choice.token), choice.confidence)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids in the draft vocabulary → ids in the target's, any shape."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    @property
    def embeds_alone(self) -> bool:
        """Whether this process has the whole matrix that it embeds with."""
        return self._shared_embedding is None

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [T] int64 → [T, H]; what is embedded already stays as it is."""
        if tokens.is_floating_point():
            return tokens
        shared = self._shared_embedding
        return F.embedding(tokens, self.target_embedding) if shared is None else shared(tokens)

    @property
    def _shared_embedding(self) -> Callable[[Tensor], Tensor] | None:
        return None if self.shared is None or self.config.brings_embedding else self.shared.embed

    def _below_last(
        self, tokens: Tensor, hidden: Tensor, angles: Angles, attend: Attend | None
    ) -> tuple[Tensor, Tensor]:
        """Residual and input of the last layer's attention; the layers below it run."""
        layers: list[Any] = list(self.layers)
        residual = normed = layers[0].hidden_norm(hidden)
        if not self.config.norm_before_residual:
            residual = hidden
        embedded = layers[0].embedding_norm(self.embed(tokens).to(hidden.dtype))
        entry = torch.cat([embedded, normed], dim=-1)
        for index, layer in enumerate(layers[:-1]):
            residual, entry = layer(residual, entry, angles, index, attend, layers[index + 1].hidden_norm)
        return residual, entry

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        target_embedding: Tensor,
        target_lm_head: Tensor | None,
        shared: SharedVocabulary | None = None,
        config: Eagle3Config | None = None,
    ) -> "Eagle3Drafter":
        """Read a checkpoint directory; `config`: where it is not a `LlamaForCausalLMEagle3`'s own.

        Raises:
            CheckpointError: naming what is missing or does not fit.
        """
        config = config or Eagle3Config.read(path)
        found = {name.removeprefix("model."): tensor for name, tensor in read_weights(path).items()}
        reader = WeightReader(path, {_NAMES.get(name, name): tensor for name, tensor in found.items()})
        vocab = shared.size if shared else len(target_embedding)
        if config.brings_embedding:
            target_embedding = reader.tensor("embed_tokens.weight").to(device=device, dtype=dtype)
            vocab = len(target_embedding)
        _check_target(path, config, vocab, target_embedding.shape[1])
        with Unfilled(dtype):
            drafter = cls(config, target_embedding, target_lm_head)
        drafter.shared = shared
        for name, parameter in drafter._plain_parameters().items():
            reader.fill(parameter, name)
        for index, layer in enumerate(drafter.layers):
            prefix = (
                "midlayer." if index == 0 and "midlayer.hidden_norm.weight" in reader else f"layers.{index}."
            )
            _fill_layer(reader, layer, prefix)
        if config.draft_vocab_size is not None:
            drafter.d2t = reader.offsets("d2t", config.draft_vocab_size, config.vocab_size)
        return drafter.to(device=device, dtype=dtype).eval()

    def save(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `config.json` and `model.safetensors`; SGLang's `EAGLE3` loads the result as it is."""
        weights: dict[str, Tensor] = dict(self._plain_parameters())
        for index, layer in enumerate(self.layers):
            weights.update(_layer_weights(layer, "midlayer." if index == 0 else f"layers.{index}."))
        if self.d2t is not None:
            known = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            known[self.target_ids(torch.arange(len(self.d2t), device=self.d2t.device)).cpu()] = True
            weights |= {"d2t": self.d2t, "t2d": known}
        write_checkpoint(path, self.config.to_json(), weights, dtype)

    def _plain_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters whose name in the checkpoint is their name here."""
        layers = tuple(f"layers.{index}." for index in range(self.num_layers))
        return {name: value for name, value in self.named_parameters() if not name.startswith(layers)}


def _fill_layer(reader: WeightReader, layer: Any, prefix: str) -> None:
    reader.fill_attention(layer.attention, f"{prefix}self_attn.")
    reader.fill_mlp(layer.mlp, f"{prefix}mlp.")
    reader.fill(layer.hidden_norm.weight, f"{prefix}hidden_norm.weight")
    reader.fill(layer.mlp_norm.weight, f"{prefix}post_attention_layernorm.weight")
    if layer.embedding_norm is not None:
        reader.fill(layer.embedding_norm.weight, f"{prefix}input_layernorm.weight")


def _layer_weights(layer: Any, prefix: str) -> dict[str, Tensor]:
    weights = {
        **attention_weights(layer.attention, f"{prefix}self_attn."),
        **mlp_weights(layer.mlp, f"{prefix}mlp."),
        f"{prefix}hidden_norm.weight": layer.hidden_norm.weight,
        f"{prefix}post_attention_layernorm.weight": layer.mlp_norm.weight,
    }
    if layer.embedding_norm is not None:
        weights[f"{prefix}input_layernorm.weight"] = layer.embedding_norm.weight
    return weights


def _check_target(path: Path, config: Eagle3Config, vocab: int, hidden: int) -> None:
    if hidden != config.hidden_size:
        raise CheckpointError(
            f"{path}: this EAGLE-3 drafter is for a target of hidden size {config.target_hidden_size}, "
            f"the embedding handed in has {hidden}"
        )
    if vocab < config.vocab_size:
        raise CheckpointError(f"{path}: vocab_size {config.vocab_size} exceeds the target's {vocab} tokens")


FORMAT = DraftFormat(
    name="EAGLE-3",
    arm=arms.AR,
    keys=(ARCHITECTURE, "LlamaForCausalLM"),
    layers_key=f"eagle_config.{LAYERS_KEY}",
    read=parse,
    model=Eagle3Drafter,
    published="SpecForge, lmsys, AngelSlim, nvidia, WhiFlash; yuhuili's originals",
    defined_by="SGLang's `llama_eagle3.py`",
    upstream="EAGLE3",
    swappable=True,
)
DEEPSPEC = DraftFormat(
    name="DeepSpec EAGLE-3",
    arm=arms.AR,
    keys=("Qwen3Eagle3Model",),
    layers_key="target_layer_ids",
    read=parse_deepspec,
    model=Eagle3Drafter,
    published="deepseek-ai",
    defined_by="DeepSpec",
    upstream=None,
    swappable=True,
)
