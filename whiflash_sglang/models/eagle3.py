"""The EAGLE-3 drafter (arXiv 2503.01840) in SGLang's checkpoint format, without SGLang.

A decoder layer whose QKV input is [norm(embedding of the next token); norm(fused target feature)], and in some
checkpoints more layers on top of it. Entry p of their caches pairs the embedding of token p+1 with the target's feature
at p, at RoPE position p; a later draft step feeds back the last layer's state before the final norm. Numerics follow
`sglang/srt/models/llama_eagle3.py` of SGLang 0.5.23.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from whiflash_sglang import arms
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.checkpoint import (
    WeightReader,
    attention_weights,
    mlp_weights,
    read_weights,
    write_checkpoint,
)
from whiflash_sglang.models.choice import Choice, DraftHead, DraftStep
from whiflash_sglang.models.draft_format import DraftFormat
from whiflash_sglang.models.eagle3_config import ARCHITECTURE, LAYERS_KEY, Eagle3Config, parse, parse_deepspec
from whiflash_sglang.models.layers import Attend, Attention, RMSNorm, SwiGLU
from whiflash_sglang.models.packed import Linear
from whiflash_sglang.models.rope import Angles, Rotary
from whiflash_sglang.models.vocabulary import SharedVocabulary, borrowed_head

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
    """Of the target, where its vocabulary is split or quantised: the two matrices hold this process's rows, or none."""

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

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> DraftStep:
        """One step: next-token ids [T] int64, fused features or fed-back states [T, H], positions [T]."""
        angles = self.rotary.angles(positions)
        residual, entry = self._below_last(tokens, hidden, angles, attend)
        last = self.num_layers - 1
        residual, normed = self.layers[last](residual, entry, angles, last, attend, self.norm)
        return DraftStep(normed if self.config.norm_output else residual, normed)

    @property
    def head(self) -> DraftHead:
        """What it chooses from: a head of its own, or the target's."""
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
        """Token ids [T] int64 → [T, H]."""
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
    defined_by="SGLang 0.5.23, `models/llama_eagle3.py`",
)
DEEPSPEC = DraftFormat(
    name="DeepSpec EAGLE-3",
    arm=arms.AR,
    keys=("Qwen3Eagle3Model",),
    layers_key="target_layer_ids",
    read=parse_deepspec,
    model=Eagle3Drafter,
    published="deepseek-ai",
    defined_by="DeepSpec (formula in the test)",
)
