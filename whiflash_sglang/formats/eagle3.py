"""The EAGLE-3 drafter (arXiv 2503.01840), read from SGLang's checkpoint format. Imports no SGLang.

It has a decoder layer whose QKV input is [norm(embedding of the next token); norm(fused target feature)], and in some
checkpoints more layers above it. Entry p of their caches pairs the embedding of token p+1 with the target's feature
at p, at RoPE position p; a later draft step feeds back the last layer's state before the final norm. Numerics follow
`sglang/srt/models/llama_eagle3.py` of SGLang 0.5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats import checkpoint
from whiflash_sglang.formats.checkpoint import MOST_LAYERS, WeightReader, integer
from whiflash_sglang.formats.choice import DraftHead, SharedVocabulary, TargetsParts
from whiflash_sglang.formats.config_json import misfit, read_config_of
from whiflash_sglang.formats.draft_format import DraftFormat
from whiflash_sglang.formats.layers import Angles, Attend, Attention, AttentionShape, RMSNorm, Rotary, SwiGLU
from whiflash_sglang.formats.packed import Linear

ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Sizes and variants of an EAGLE-3 checkpoint.

    Attributes:
        target_hidden_size: size of one captured feature; `num_features` of them are concatenated.
        draft_vocab_size: rows of the drafter's own head; None: it uses the target's head.
        target_layer_ids: layers whose outputs are captured; empty: SGLang's default.
        norm_before_fc: one norm over the concatenation. fc_norm: one norm for each feature.
        norm_output: a draft step feeds back the state after the final norm.
        norm_before_residual: the layer adds to the normed feature, not to the feature. head_norms: queries and keys are
            normed. own_embedding: the file's embedding was trained, so it is used instead of the target's.
        upper_norm: name of the norm before attention in layers above the first. mask_token: P-EAGLE's token at rows
            after the first, which all draft in one pass; None: a chain drafter.
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
    upper_norm: str = "hidden_norm"
    mask_token: int | None = None

    @property
    def brings_embedding(self) -> bool:
        """Whether the drafter embeds with a matrix of its checkpoint instead of the target's."""
        return self.own_embedding or self.target_hidden_size != self.hidden_size

    def layers_of(self, num_target_layers: int) -> tuple[int, ...]:
        """Return the target layers whose outputs are read, for a target of `num_target_layers` layers.

        SGLang's ids name the layer *before* which the state is captured; its default is [2, L//2, L-3], which are the
        outputs of [1, L//2-1, L-4]. An explicit list in the checkpoint already names outputs (SGLang adds one to each).
        """
        last = num_target_layers
        return self.target_layer_ids or (1, last // 2 - 1, last - 4)

    def to_json(self) -> dict[str, Any]:
        """Return the drafter's `config.json` for SGLang. Raises ValueError for variants that SGLang cannot load."""
        if self.norm_before_residual or self.head_norms or self.attention_bias or self.own_embedding:
            raise ValueError("only what SGLang loads is written")
        layers = list(self.target_layer_ids)
        own = ("target_hidden_size", "draft_vocab_size", "norm_before_fc", "fc_norm", "norm_output")
        features = {} if layers or self.num_features == 3 else {"num_aux_hidden_states": self.num_features}
        return {
            **checkpoint.trunk_json(self),
            **{name: getattr(self, name) for name in own},
            **features,
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "bias": self.fc_bias,
            "eagle_config": {LAYERS_KEY: layers} if layers else {},
        }


def parse(path: Path, config: Mapping[str, Any]) -> Eagle3Config:
    """Read a `LlamaForCausalLMEagle3`'s configuration. Raises `CheckpointError` naming the field that does not fit."""
    if config.get("hidden_act", "silu") != "silu":
        raise misfit(path, f"hidden_act {config['hidden_act']!r} is not supported, only silu")
    if config.get("architectures") == ["LlamaForCausalLM"] and not config.get("draft_vocab_size"):
        raise misfit(path, "a LlamaForCausalLM without draft_vocab_size is a target, not an EAGLE-3 drafter")
    if config.get("rope_is_neox_style") is False:
        raise misfit(path, "rope_is_neox_style false is not supported")
    if config.get("tie_word_embeddings"):
        raise misfit(path, "tie_word_embeddings is not supported for an EAGLE-3 drafter")
    token = config.get("ptd_token_id", config.get("pard_token"))
    eagle = config.get("eagle_config") or {}
    layers = checkpoint.layer_ids(eagle, LAYERS_KEY, path, "eagle_config.") if eagle.get(LAYERS_KEY) else ()
    draft_vocab = config.get("draft_vocab_size")
    common = checkpoint.trunk(config, path, positions=8192, eps=1e-5)
    read = Eagle3Config(
        **common,
        target_hidden_size=integer(config, "target_hidden_size", path, default=common["hidden_size"]),
        intermediate_size=integer(config, "intermediate_size", path),
        draft_vocab_size=None if draft_vocab is None else integer(config, "draft_vocab_size", path),
        num_layers=integer(config, "num_hidden_layers", path, maximum=MOST_LAYERS),
        num_features=integer(config, "num_aux_hidden_states", path, maximum=MOST_LAYERS, default=len(layers) or 3),
        target_layer_ids=layers,
        fc_bias=bool(config.get("bias", False)),
        norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc", False))),
        fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm", False)),
        norm_output=bool(config.get("norm_output", False)),
    )
    if token is None:
        return read
    # P-EAGLE is read as in vLLM 0.33 (`llama_eagle3.py`), since SGLang knows neither it nor these keys.
    if integer({"ptd_token_id": token}, "ptd_token_id", path, minimum=0) >= read.vocab_size:
        raise misfit(path, f"ptd_token_id {token} is not in the vocabulary of {read.vocab_size}")
    read = replace(read, norm_before_residual=bool(config.get("norm_before_residual", False)))
    read = replace(read, attention_bias=bool(config.get("attention_bias", False)))
    return replace(read, mask_token=token, own_embedding=True, upper_norm="input_layernorm")


def parse_deepspec(path: Path, config: Mapping[str, Any]) -> Eagle3Config:
    """Read the configuration of DeepSpec's `Qwen3Eagle3Model`: Qwen3's head norms, layer ids at the top level, a head
    over the whole vocabulary. Raises `CheckpointError` naming the field that does not fit.
    """
    layers = checkpoint.layer_ids(config, "target_layer_ids", path)
    read = parse(path, {**config, "draft_vocab_size": config.get("vocab_size"), "tie_word_embeddings": False})
    if read.num_layers != 1:
        raise misfit(path, f"num_hidden_layers {read.num_layers}: DeepSpec's EAGLE-3 has one layer")
    return replace(
        read,
        target_layer_ids=layers,
        num_features=len(layers),
        head_norms=True,
        attention_bias=bool(config.get("attention_bias", False)),
    )


def _names(config: Eagle3Config) -> dict[str, str]:
    """Return tensor name in other exporters' files → our name."""
    earlier = enumerate(("low", "mid", "high"))
    upper = (f"layers.{index}." for index in range(1, config.num_layers))
    names = {f"aux_norm_{place}.weight": f"fc_norm.{i}.weight" for i, place in earlier}
    return names | {f"{layer}{config.upper_norm}.weight": f"{layer}hidden_norm.weight" for layer in upper}


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
        """Run the layer on `residual` [T, H] and attention's input `entry` [T, H or 2H] → new residual, its `norm`."""
        # A new tensor, since `norm.add` overwrites its input and the caller may need the residual.
        residual = residual + self.attention(entry, angles, index, attend)
        return norm.add(residual, self.mlp(self.mlp_norm(residual)))


class Eagle3Drafter(TargetsParts):
    """An EAGLE-3 chain drafter.

    Attributes:
        d2t: [draft_vocab] int64 offsets, target id = d2t[i] + i; None where the vocabularies are the same.
        mask_hidden: [F], P-EAGLE's feature for the rows of mask tokens; None for a chain drafter.
    """

    config: Eagle3Config
    d2t: Tensor | None
    mask_hidden: Tensor | None

    def __init__(self, config: Eagle3Config, target_embedding: Tensor, target_lm_head: Tensor | None = None) -> None:
        """Make an untrained drafter. `target_lm_head` [V, H] is its head if `draft_vocab_size` is None."""
        borrows = config.draft_vocab_size is None
        super().__init__(target_embedding, target_lm_head if borrows else None)
        if borrows and target_lm_head is None:
            raise CheckpointError("this EAGLE-3 drafter has no head of its own; the target's must be handed in")
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
        self.register_buffer("mask_hidden", None, persistent=False)
        if config.draft_vocab_size is None:
            self.lm_head = None
            self.register_buffer("d2t", None)
        else:
            self.lm_head = Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))

    @property
    def draft_vocab_size(self) -> int:
        """Number of tokens that the head can draft."""
        return self.config.draft_vocab_size or self.config.vocab_size

    def fuse(self, features: Tensor) -> Tensor:
        """Fuse `features` [T, num_features · Ht], layers in ascending order, into [T, H]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.config.fc_norm:
            chunks = features.chunk(self.config.num_features, dim=-1)
            features = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], dim=-1)
        fused: Tensor = self.fc(features)
        return fused

    def keys_values(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the last layer's k and v, [T, Hkv, D], from next-token ids [T], fused features [T, H], positions [T].

        Layers below the last run completely, and `attend` stores their k and v. A drafter of one layer needs no
        attention. Raises `CheckpointError` for several layers without `attend`.
        """
        if attend is None and self.config.num_layers > 1:
            raise CheckpointError(
                f"K/V of an EAGLE-3 drafter of {self.config.num_layers} layers need attention over the text"
            )
        angles = self.rotary.angles(positions)
        _, entry = self._below_last(tokens, hidden, angles, attend)
        last: Any = self.layers[-1]
        keys_values: tuple[Tensor, Tensor] = last.attention.keys_values(entry, angles)
        return keys_values

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Run one draft step: next-token ids [T] int64, fused features or fed-back states [T, H], positions [T].

        Returns the state [T, H] that the chain's next step feeds back, and the state [T, H] that the head reads.
        """
        angles = self.rotary.angles(positions)
        residual, entry = self._below_last(tokens, hidden, angles, attend)
        last = self.config.num_layers - 1
        residual, normed = self.layers[last](residual, entry, angles, last, attend, self.norm)
        return normed if self.config.norm_output else residual, normed

    @property
    def head(self) -> DraftHead:
        """The head that chooses the drafts: the checkpoint's own, else the target's."""
        return super().head if self.lm_head is None else DraftHead(self.lm_head.weight, None)

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Map ids of the draft vocabulary to the target's ids, any shape."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def _below_last(
        self, tokens: Tensor, hidden: Tensor, angles: Angles, attend: Attend | None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers below the last; returns residual and input of the last layer's attention."""
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
        """Read a checkpoint directory. Raises CheckpointError naming what is missing or does not fit.

        config: of another format than `LlamaForCausalLMEagle3`; None: read here.
        """
        config = config or parse(path, read_config_of(path, (ARCHITECTURE,)))
        reader = WeightReader.of(path, _names(config))
        vocab = shared.size if shared else len(target_embedding)
        if config.brings_embedding:
            target_embedding = reader.tensor("embed_tokens.weight", (None, None)).to(device=device, dtype=dtype)
            vocab = len(target_embedding)
        checkpoint.check_target(path, "EAGLE-3", config, config.hidden_size, target_embedding, vocab)
        with reader.modules(dtype):
            drafter = cls(config, target_embedding, target_lm_head)
        # Every process has the whole of an embedding that the checkpoint brings.
        drafter.shared = replace(shared, embed=None) if shared and config.brings_embedding else shared
        reader.fill_drafter(drafter, {})
        if config.draft_vocab_size is not None:
            drafter.d2t = reader.offsets("d2t", config.draft_vocab_size, config.vocab_size)
        if config.mask_token is not None:
            drafter.mask_hidden, width = reader.tensor("mask_hidden").flatten(), drafter.fc.in_features
            if len(drafter.mask_hidden) != width:
                raise CheckpointError(f"{path}: mask_hidden has {len(drafter.mask_hidden)} numbers, fc reads {width}")
        return drafter.to(device=device, dtype=dtype).eval()

    def save(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `config.json` and `model.safetensors`; SGLang's `EAGLE3` loads the result as it is."""
        weights = checkpoint.drafter_weights(self, "midlayer.")
        if self.d2t is not None:
            known = torch.zeros(self.config.vocab_size, dtype=torch.bool)
            known[self.target_ids(torch.arange(len(self.d2t), device=self.d2t.device)).cpu()] = True
            weights |= {"d2t": self.d2t, "t2d": known}
        checkpoint.write_checkpoint(path, self.config.to_json(), weights, dtype)


FORMAT = DraftFormat(
    name="EAGLE-3",
    arm=arms.AR,
    keys=(ARCHITECTURE, "LlamaForCausalLM"),
    layers_key=f"eagle_config.{LAYERS_KEY}",
    read=parse,
    model=Eagle3Drafter,
    published="SpecForge, lmsys, AngelSlim, nvidia, WhiFlash; yuhuili's originals; amazon's P-EAGLE",
    defined_by="SGLang's `llama_eagle3.py`; P-EAGLE: vLLM's",
    upstream="EAGLE3",
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
)
