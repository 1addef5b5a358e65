"""The FlashMap drafter (PyPI: flashmap 0.1.0): a flow map from noise to the tokens of a block in one pass.

    h_0 = x_embed(norm(mean of E) + g · norm(z E)), z a row of noise over the vocabulary for each draft
    h = h + gate ∘ f(scale ∘ layer_norm(h) + shift), f in every layer: self-attention in the block, attention to the
    context, an MLP                             logits = E_out · head(scale ∘ layer_norm(h) + shift)

The context is a fused feature of every token; the bonus token's embedding replaces its feature. Scales, shifts and
gates depend only on the times of the jump, 0 and 1: they are computed when a checkpoint is loaded, and so is h_0. The
publisher draws new noise for every block. Here `DRAWS` blocks are drawn once, from a fixed seed, and the bonus token's
position selects one, so a replayed round has the same drafts, on every rank. Numerics follow `FlashMapDraftModel`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from whiflash_kernels import packed

from whiflash_sglang.formats.checkpoint import IN_FILES, WeightReader, integer, number
from whiflash_sglang.formats.choice import DraftHead
from whiflash_sglang.formats.config_json import misfit
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter, block_format, fold_variants
from whiflash_sglang.formats.dflash.dflash_config import DFlashConfig, parse
from whiflash_sglang.formats.layers import Angles, Attend, Attention, RMSNorm, rotate_both
from whiflash_sglang.formats.packed import Linear

DRAWS, AT_ONCE = 16, 8192
"""Number of noise blocks, and of tokens that are embedded at a time to make them."""
_IN_LAYERS = {
    f"{ours}.{part}": tuple(name.replace("self_attn", theirs) for name in IN_FILES[f"attention.{part}"])
    for ours, theirs in (("attention", "cross_attn"), ("self_attn", "self_attn"))
    for part in ("qkv", "out", "q_norm", "k_norm")
}
"""Parameter of a layer's two attentions → its tensors in files."""


@dataclass(frozen=True, slots=True)
class FlashMapConfig(DFlashConfig):
    """FlashMap's settings. layer_norm_eps: of modulated norms. time_scale: factor of times in their sines' angles."""

    target_hidden_size: int = 0
    layer_norm_eps: float = 1e-6
    time_scale: float = 0.0
    anchored: ClassVar[bool] = True


def read_flashmap(path: Path, config: Mapping[str, Any]) -> FlashMapConfig:
    """Read a release's `config.json`. Raises CheckpointError naming the field that does not fit."""
    # Other models draft in several jumps, over states as wide as the vocabulary.
    for key, served in (("flow_map", True), ("num_steps", 1)):
        if config.get(key, served) != served:
            raise misfit(path, f"{key} {config[key]!r} is not supported, only {served!r}")
    rows, vocab = integer(config, "draft_vocab_size", path, minimum=0, default=0), config.get("vocab_size")
    return parse(
        path,
        {**config, "mask_token_id": 0, "rope_is_neox_style": False},
        FlashMapConfig,
        from_anchor=True,
        draft_vocab_size=None if rows in (0, vocab) else rows,
        head_norm_eps=number(config, "qk_norm_eps", path, default=1e-5),
        target_hidden_size=integer(config, "target_hidden_size", path),
        layer_norm_eps=number(config, "layer_norm_eps", path, default=1e-6),
        time_scale=number(config, "time_scale", path, default=1000.0),
    )


class Modulated(nn.Module):
    """A layer norm with `modulation` [3, H]: scale and shift of the normed input, and gate of the sublayer's output."""

    modulation: Tensor

    def __init__(self, config: FlashMapConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps
        self.register_buffer("modulation", torch.zeros(3, config.hidden_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Norm `x`, then scale and shift it, [T, H] → [T, H]."""
        scale, shift, _ = self.modulation
        return F.layer_norm(x, scale.shape, scale, shift, self.eps)

    def add(self, hidden: Tensor, made: Tensor) -> Tensor:
        """Add the sublayer's output `made`, times the gate, to `hidden`, [T, H] each → [T, H]."""
        return torch.addcmul(hidden, self.modulation[2], made)


class FlashMapLayer(nn.Module):
    """A layer of the map. Its `attention` sees only the context, whose K and V are computed as in DFlash."""

    def __init__(self, config: FlashMapConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.head_norm_eps
        self.self_attn_adaln, self.cross_attn_adaln, self.mlp_adaln = (Modulated(config) for _ in range(3))
        self.self_attn = Attention(size, size, config.attention, head_norm_eps=eps)
        self.attention = Attention(size, size, config.attention, head_norm_eps=eps)
        inner = config.intermediate_size
        self.mlp = nn.ModuleDict({"fc1": Linear(size, inner), "fc2": Linear(inner, size)})

    def forward(self, hidden: Tensor, angles: Angles, rows: int, seen: Callable[[Tensor], Tensor]) -> Tensor:
        """Run the layer on `hidden` [T, H], whole blocks of `rows`. seen: queries [T, heads, D] → context attention."""
        attended = self.self_attn(self.self_attn_adaln(hidden), angles, 0, partial(_in_blocks, rows))
        hidden = self.self_attn_adaln.add(hidden, attended)
        attended = self._crossed(self.cross_attn_adaln(hidden), angles, seen)
        hidden = self.cross_attn_adaln.add(hidden, attended)
        mixed = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.mlp_adaln(hidden))))
        return self.mlp_adaln.add(hidden, mixed)

    def _crossed(self, x: Tensor, angles: Angles, seen: Callable[[Tensor], Tensor]) -> Tensor:
        attention = self.attention
        weight = packed.rows(attention.qkv.weight, slice(attention.query_size))
        q = packed.linear(x, weight).view(len(x), attention.shape.heads, -1)
        assert attention.q_norm is not None
        # Split in two, because the fused kernel rotates two tensors.
        first, second = attention.q_norm(q).chunk(2, 1)
        q = torch.cat(rotate_both(first, second, angles), 1)
        mixed: Tensor = attention.out(seen(q).reshape(len(x), -1))
        return mixed


def _in_blocks(rows: int, _: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention within every block of `rows`; q, k, v and the result are [T, heads, D] each."""
    q, k, v = (x.reshape(-1, rows, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


class FlashMapDrafter(DFlashDrafter):
    """A block drafter whose rows begin as noise: `starts` [DRAWS, rows, H] holds h_0 of every noise block."""

    config: FlashMapConfig
    layer: ClassVar[type[nn.Module]] = FlashMapLayer
    starts: Tensor
    _folded: DraftHead

    def __init__(self, config: FlashMapConfig, target_embedding: Tensor, target_lm_head: Tensor) -> None:
        """Make an untrained drafter; see `DFlashDrafter`."""
        super().__init__(config, target_embedding, target_lm_head)
        size, theirs = config.hidden_size, config.target_hidden_size
        norm = partial(RMSNorm, eps=config.rms_norm_eps)
        del self.norm
        self.anchor_proj, self.anchor_norm = Linear(theirs, size), norm(size)
        self.state_norm, self.noise_norm = norm(theirs), norm(theirs)
        self.noise_gate = nn.Parameter(torch.ones(1))
        self.x_embed, self.out = Linear(theirs, size), Linear(size, theirs)
        self.final_adaln = Modulated(config)

    @property
    def head(self) -> DraftHead:
        """The map's output layer and the target's head, multiplied into one matrix with a bias."""
        return self._folded

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Draft blocks after the bonus tokens [B, 1] int64 at `positions` [B, 1] → normed states [B, rows, H].

        `attend` stores one entry for each request, the bonus token's, and receives the queries of its block.
        """
        rows, first = self.config.block_size, positions[:, 0]
        anchor = self.anchor_norm(self.anchor_proj(self.embed(tokens[:, 0])))
        k, v = self.keys_values(anchor, first)
        hidden = self.starts[first % DRAWS].flatten(0, 1)
        places = positions + torch.arange(1, rows + 1, device=positions.device)
        angles = self.rotary.angles(places.flatten())
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, angles, rows, lambda q, i=index: attend(i, q, k[i], v[i]))
        normed: Tensor = self.final_adaln(hidden)
        return normed.view(len(tokens), rows, -1)

    @classmethod
    def load(cls, path: Path, **options: Any) -> Any:
        """Read a checkpoint directory like `DFlashDrafter.load`, then compute `starts` and the folded head."""
        drafter: Any = super().load(path, **options)
        drafter.starts, drafter._folded = drafter._begin(), drafter._fold()
        return drafter

    def fill(self, reader: WeightReader) -> None:
        """Fill the drafter from the checkpoint's tensors, and compute the modulations; see `DFlashDrafter.fill`."""
        reader.fill_drafter(self, {"out.weight": "head.weight", "out.bias": "head.bias"}, _IN_LAYERS)
        follows = F.silu(self._times(reader))
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                fold_variants(self.config, module)
            elif isinstance(module, Modulated):
                rows = 3 * self.config.hidden_size
                module.modulation = _affine(reader, f"{name}.linear", follows, rows).view(3, -1)
                module.modulation[0] += 1
        if (drafted := self.config.draft_vocab_size) is not None:
            # `draft_vocab.safetensors` lists all ids, the most frequent first.
            self.own_ids = reader.ids("ids", drafted, self.config.vocab_size)

    def _times(self, reader: WeightReader) -> Tensor:
        """Embed the jump's beginning and end, 0 and 1, as one vector [C]."""
        half = reader.tensor("time_embed.linear_1.weight", (None, None)).shape[1] // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        embedded = []
        for time, name in enumerate(("time_embed", "jump_embed")):
            angles = time * self.config.time_scale * rates
            sines = torch.cat([angles.cos(), angles.sin()]).to(self.fc.weight.dtype)
            inner = F.silu(_affine(reader, f"{name}.linear_1", sines))
            embedded.append(_affine(reader, f"{name}.linear_2", inner))
        return embedded[0] + embedded[1]

    @torch.no_grad()
    def _begin(self) -> Tensor:
        """Return `starts`, the first hidden states of blocks, from the target's embeddings mixed by seeded noise."""
        rows, vocab = DRAWS * self.config.block_size, self.config.vocab_size
        weight, generator = self.x_embed.weight, torch.Generator().manual_seed(0)
        mean = weight.new_zeros(1, self.config.target_hidden_size, dtype=torch.float32)
        noise = mean.repeat(rows, 1)
        for ids in torch.split(torch.arange(vocab, device=weight.device), AT_ONCE):
            embedded = self.embed(ids)
            mean += embedded.float().sum(0) / vocab
            noise += torch.randn(rows, len(ids), generator=generator).to(embedded) @ embedded
        read = self.noise_gate * self.noise_norm(noise.to(weight.dtype))
        begun: Tensor = self.x_embed(self.state_norm(mean.to(weight.dtype)) + read)
        return begun.view(DRAWS, self.config.block_size, -1)

    @torch.no_grad()
    def _fold(self) -> DraftHead:
        """Return the map's output layer and the target's head as one matrix with a bias."""
        head = super(DFlashDrafter, self).head
        if self.own_ids is not None:
            head = head.within(self.own_ids)
        both = head.logits(torch.cat([self.out.weight.t(), self.out.bias[None]]))
        return replace(head, weight=both[:-1].t().contiguous(), bias=both[-1].clone(), kept=None)

    def target_written(self) -> None:
        """Recompute `starts` and the folded head in place, after the target's weights were written in place."""
        now, had = self._fold(), self._folded
        pairs: Any = ((self.starts, self._begin()), (had.weight, now.weight), (had.bias, now.bias))
        for held, value in pairs:
            held.copy_(value)
            packed.follow(held)


def _affine(reader: WeightReader, name: str, x: Tensor, rows: int | None = None) -> Tensor:
    """Apply the file's linear layer `name` to `x` [K], in the dtype of `x` → [N]; N must be `rows` if that is given."""
    weight = reader.tensor(f"{name}.weight", (rows, len(x)))
    bias = reader.tensor(f"{name}.bias", (len(weight),))
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


# SGLang has transformers read a draft's `config.json`, which knows no FlashMap.
CONFIG_MAPPING.register("flashmap", PretrainedConfig, exist_ok=True)
FORMAT = block_format(
    name="FlashMap",
    keys=("FlashMapDraftModel",),
    read=read_flashmap,
    model=FlashMapDrafter,
    published="j-shen",
    defined_by="flashmap 0.1.0",
    upstream=None,
)
