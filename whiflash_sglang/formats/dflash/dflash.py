"""The DFlash block drafter (arXiv 2602.06036), read from `DFlashDraftModel` checkpoints. Imports no SGLang.

A block is the last committed (bonus) token followed by mask tokens; one non-causal pass drafts them all. The
context enters only as extra K/V, projected by every layer from one fused feature per token. Embedding and LM
head are the target's. Numerics follow `sglang/srt/models/dflash.py` of SGLang 0.5.23.

Other formats subclass this trunk and change its layers, or how its states become tokens (`propose`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whiflash_kernels import packed

from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats import layers
from whiflash_sglang.formats.checkpoint import WeightReader, check_target, drafter_weights, write_checkpoint
from whiflash_sglang.formats.choice import Choice, DraftHead, SharedVocabulary, TargetsParts
from whiflash_sglang.formats.config_json import read_config_of
from whiflash_sglang.formats.dflash.dflash_config import ALIASES, ARCHITECTURE, DFlashConfig, parse
from whiflash_sglang.formats.draft_format import DraftFormat
from whiflash_sglang.formats.layers import Angles, Attend, Attention, GemmaRMSNorm, RMSNorm, Rotary, SwiGLU
from whiflash_sglang.formats.packed import Linear


class BlockConv(nn.Module):
    """Causal depthwise convolutions over a block's rows, before and after a sublayer f, with kernels computed from x.

    y = conv(f(conv(x, before)), after)        conv(x, w)_t = Σ_j w_tj · x_{t-j}, rows of the same block
    [before_t | after_t] = base + P x_t, one P x_t for every `group` channels

    shape: taps, the rows that a kernel covers, the current one included; and `group`.
    """

    def __init__(self, size: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = taps, group = shape
        base = torch.zeros(2, taps, size)
        base[:, 0] = 1.0  # untrained, the convolutions change nothing
        self.base_kernel = nn.Parameter(base)
        self.kernel_projection = Linear(size, 2 * taps * (size // group), bias=False)

    def kernels(self, x: Tensor) -> Tensor:
        """Compute the kernels before and after the sublayer from `x` [T, H]: [2, T, taps, H]."""
        taps, group = self.shape
        moved: Tensor = self.kernel_projection(x).view(len(x), 2, taps, -1).repeat_interleave(group, -1)
        return (self.base_kernel + moved).transpose(0, 1)

    def convolve(self, x: Tensor, kernel: Tensor, rows: int) -> Tensor:
        """Convolve `x` [T, H], whole blocks of `rows`, with `kernel` [T, taps, H] → [T, H]."""
        out = kernel[:, 0] * x
        blocks = x.view(-1, rows, x.shape[-1])
        for tap in range(1, min(self.shape[0], rows)):
            earlier = F.pad(blocks[:, :-tap], (0, 0, tap, 0)).view_as(x)
            out = out + kernel[:, tap] * earlier
        return out


class DFlashLayer(nn.Module):
    """A decoder layer. Its K and V of context tokens come from the same projection as those of the block."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        norm = norm_of(config)
        self.input_norm = norm(size, eps)
        self.attention = Attention(
            size, size, config.attention, head_norm_eps=eps, bias=config.attention_bias, norm=norm
        )
        self.mlp_norm = norm(size, eps)
        self.mlp = SwiGLU(size, config.intermediate_size, config.clamped)
        self.convolutions = nn.ModuleDict()
        if config.convolution is not None:
            for name in ("attention_conv", "mlp_conv"):
                self.convolutions[name] = BlockConv(size, config.convolution)

    def forward(self, hidden: Tensor, angles: Angles, index: int, attend: Attend, rows: int) -> Tensor:
        """Run the layer on `hidden` [T, H], whole blocks of `rows` → [T, H]. `hidden` may be overwritten."""
        attention = partial(self.attention, angles=angles, layer=index, attend=attend)
        attended = self._within("attention_conv", attention, self.input_norm(hidden), rows)
        hidden, normed = self.mlp_norm.add(hidden, attended)
        return hidden + self._within("mlp_conv", self.mlp, normed, rows)

    def _within(self, name: str, sublayer: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """Apply `sublayer` to `x` [T, H], between its two convolutions if the checkpoint has them."""
        if name not in self.convolutions:
            return sublayer(x)
        around: Any = self.convolutions[name]
        before, after = around.kernels(x)
        mixed: Tensor = around.convolve(sublayer(around.convolve(x, before, rows)), after, rows)
        return mixed


def norm_of(config: DFlashConfig) -> type[RMSNorm]:
    """Return the norm class that all layers of a checkpoint use."""
    return GemmaRMSNorm if config.gemma_norm else RMSNorm


@torch.no_grad()
def fold_variants(config: DFlashConfig, attention: Attention) -> None:
    """Fold two variants into attention's weights, in place: V's scale, and RoPE over neighbouring dimensions."""
    heads, kv_heads, head_dim = attention.shape
    rotated = (heads + kv_heads) * head_dim
    width = layers.rotary_width(config.rope, head_dim)
    for rows in (attention.qkv.weight, attention.qkv.bias):
        if rows is not None:
            rows[rotated:] *= config.value_scale
            if config.neighbours:
                rows[:rotated] = layers.half_split(rows[:rotated], heads + kv_heads, width)
    if config.neighbours and attention.q_norm is not None and attention.k_norm is not None:
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.copy_(layers.half_split(norm.weight, 1, width))


MASK_EMBEDDING = "mask_embedding.pt"
"""File beside the weights with a trained embedding of the mask token, as SGLang 0.5.23 reads it."""


class DFlashDrafter(TargetsParts):
    """A block-diffusion drafter.

    Attributes: `embedding_scale`, the target's factor of its embedding (Gemma), set by the caller. `target_mtp`, the
    checkpoint's own head [rows, H], and `own_ids`, its rows' target ids; None: the target's head drafts.
    """

    embedding_scale: float = 1.0
    target_mtp: Tensor | None
    own_ids: Tensor | None
    mask_embedding: Tensor | None
    names: ClassVar[Mapping[str, str]] = {}
    """Parameter that a format adds to the trunk → its name in files, if that differs."""
    renamed: ClassVar[dict[str, str]] = {
        "encoder.fc.weight": "fc.weight",
        "encoder.output_norm_enc.weight": "hidden_norm.weight",
    }
    """Tensor name of another exporter → the usual name."""
    layer: ClassVar[type[nn.Module]] = DFlashLayer
    logits_held: ClassVar[int] = 1
    """How many copies of all drafts' logits `propose` holds at once, for estimates of memory."""

    def __init__(self, config: DFlashConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Make an untrained drafter that uses the target's embedding and head, [V, H] each."""
        super().__init__(target_embedding, target_lm_head)
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        norm = norm_of(config)
        self.fc = Linear(config.num_features * config.target_hidden_size, size, bias=False)
        self.hidden_norm = norm(size, eps)
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.num_layers))
        self.norm = norm(size, eps)
        self.rotary = Rotary(config.rope, config.attention.head_dim, config.max_position_embeddings)
        for name in ("target_mtp", "own_ids", "mask_embedding"):
            self.register_buffer(name, None, persistent=False)
        self._context: tuple[Tensor, Tensor | None, Tensor] | None = None

    @property
    def head(self) -> DraftHead:
        """The head that drafts: the checkpoint's own, else the target's."""
        return super().head if self.target_mtp is None else DraftHead(self.target_mtp, self.own_ids)

    def fuse(self, features: Tensor) -> Tensor:
        """Fuse `features` [T, len(config.target_layer_ids) · Ht] into the context feature [T, H] of all layers."""
        fused: Tensor = self.hidden_norm(self.fc(features))
        return fused

    def keys_values(self, fused: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute K and V of context tokens for all layers with one projection. `fused`: [T, H]. `positions`: [T].

        Returns k and v, each [layers, T, Hkv, D], k normed and rotated. Exact for any number of layers.
        """
        count, (_, kv_heads, head_dim) = self.config.num_layers, self.config.attention
        weight, bias, k_norm = self.stacked() if self._context is None else self._context
        kv = packed.linear(fused, weight, bias).view(len(fused), count, 2, kv_heads, head_dim)
        k, v = kv.permute(2, 1, 0, 3, 4)
        normed = F.rms_norm(k, (head_dim,), None, self.config.head_norm_eps or self.config.rms_norm_eps)
        k = normed * k_norm[:, None, None].to(k.dtype)
        rotated = layers.rotate(k.flatten(0, 1), self.rotary.angles(positions.repeat(count)))
        return rotated.view(k.shape), v

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed token ids [T] int64 → [T, H] as the target does, with its factor."""
        hidden = super().embed(tokens)
        return hidden if self.embedding_scale == 1.0 else hidden * self.embedding_scale

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run blocks of bonus and mask ids [B, rows] int64 at `positions` [B, rows] → normed states [B, rows, H]."""
        size, rows = tokens.shape
        ids = tokens.flatten()
        hidden = self.embed(ids)
        if self.mask_embedding is not None:
            trained = self.mask_embedding * self.embedding_scale
            hidden = torch.where((ids == self.config.mask_token_id)[:, None], trained, hidden)
        angles = self.rotary.angles(positions.flatten())
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, angles, index, attend, rows)
        normed: Tensor = self.norm(hidden)
        return normed.view(size, rows, -1)

    def propose(self, states: Tensor, bonus: Tensor, wanted: int, head: DraftHead) -> Choice:
        """Choose the first `wanted` drafts of every block.

        Args:
            states: [B, rows, H] of `forward`, the bonus token's row first. bonus: [B] int64, the token at that row.
            head: the property `head`, or a reduced form of it (`DraftHead.within`).

        Returns:
            tokens (the target's ids) and confidences, each [B, wanted].
        """
        rows = self.draft_rows(states, wanted)
        choice = head.choose(head.logits(rows.flatten(0, 1)))
        return Choice(head.target_ids(choice.token).view(-1, wanted), choice.confidence.view(-1, wanted))

    def draft_rows(self, states: Tensor, wanted: int) -> Tensor:
        """Select the states of the first `wanted` drafts: [B, rows, H] → [B, wanted, H]."""
        first = 0 if self.config.from_anchor else 1
        return states[:, first : first + wanted]

    def target_written(self) -> None:
        """Recompute what is derived from the target's weights, which were written in place; here nothing is."""

    def train(self, mode: bool = True) -> "DFlashDrafter":
        """Switch modes; only evaluation mode stores the stacked projection, as training changes its weights."""
        super().train(mode)
        self._context = None if mode else self.stacked()
        return self

    def stacked(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Stack all layers' K and V rows [layers · 2 · Hkv · D, H], their biases, and the K norms [layers, D]."""
        attentions: list[Any] = [layer.attention for layer in self.layers]
        rows = attentions[0].query_size
        weight = torch.cat([attention.qkv.weight[rows:] for attention in attentions])
        if self.quantised:
            packed.quantise([weight])
        bias = None
        if self.config.attention_bias:
            bias = torch.cat([attention.qkv.bias[rows:] for attention in attentions])
        return weight, bias, torch.stack([attention.k_norm.scale() for attention in attentions])

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        target_embedding: Tensor,
        target_lm_head: Tensor,
        shared: SharedVocabulary | None = None,
        config: DFlashConfig | None = None,
    ) -> "DFlashDrafter":
        """Read a checkpoint directory. Raises CheckpointError naming what is missing or does not fit.

        config: of another format than `DFlashDraftModel`; None: read here.
        """
        config = config or parse(path, read_config_of(path, (ARCHITECTURE, *ALIASES)), DFlashConfig)
        vocab = shared.size if shared else len(target_embedding)
        check_target(path, "DFlash", config, config.target_hidden_size, target_embedding, vocab)
        reader = WeightReader.of(path, cls.renamed)
        with reader.modules(dtype):
            drafter = cls(config, target_embedding, target_lm_head)
        drafter.shared = shared
        drafter.fill(reader)
        drafter.mask_embedding = _mask_embedding(path, config)
        return drafter.to(device=device, dtype=dtype).eval()

    def fill(self, reader: WeightReader) -> None:
        """Fill the drafter from the checkpoint's tensors. Raises `CheckpointError` naming the tensor at fault."""
        reader.fill_drafter(self, self.names)
        filled: list[Any] = list(self.layers)
        for layer in filled:
            fold_variants(self.config, layer.attention)
        if (rows := self.config.draft_vocab_size) is not None:
            self.target_mtp = reader.tensor("lm_head.weight", (rows, self.config.hidden_size))
            self.own_ids = reader.offsets("d2t", rows, self.config.vocab_size) + torch.arange(rows)

    def save(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `config.json` and `model.safetensors`; SGLang's `DFLASH` loads the result as it is.

        Raises:
            ValueError: the configuration is a variant, which can only be read.
        """
        write_checkpoint(path, self.config.to_json(), drafter_weights(self), dtype)


def _mask_embedding(path: Path, config: DFlashConfig) -> Tensor | None:
    file = path / MASK_EMBEDDING
    if not file.is_file():
        return None
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        embedding, token = found["embedding"], int(found["mask_token_id"])
    except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}; fetch it again") from None
    if found.get("per_position") or embedding.shape != (config.hidden_size,) or token != config.mask_token_id:
        raise CheckpointError(
            f"{file} must hold one embedding [{config.hidden_size}] of mask_token_id {config.mask_token_id}, got "
            f"{list(embedding.shape)} of {token}"
        )
    return torch.as_tensor(embedding)


block_format = partial(DraftFormat, arm=arms.DIFFUSION, layers_key="target_layer_ids")
FORMAT = block_format(
    name="DFlash",
    keys=(ARCHITECTURE, *ALIASES),
    read=lambda path, config: parse(path, config, DFlashConfig),
    model=DFlashDrafter,
    published="z-lab, SpecForge, modal-labs",
    defined_by="SGLang's `dflash.py`",
    upstream="DFLASH",
)
