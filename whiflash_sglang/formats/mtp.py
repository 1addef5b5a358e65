"""A target's own next-token head (multi-token prediction, arXiv 2412.19437, section 2.2). Imports no SGLang.

It is one decoder layer over projection([norm(embedding of the next token); norm(the target's state)]). Entry p of its
cache pairs the embedding of token p+1 with the target's state at p, after the final norm, at RoPE position p; a later
draft step feeds back the head's own state after its final norm. Numerics follow `mimo_mtp.py` and `glm4_moe_nextn.py`
in the `models/` of SGLang 0.5.23, whose EAGLE worker runs the one layer at every draft step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from whiflash_kernels.layers import silu_and_mul

from whiflash_sglang.drafts import arms
from whiflash_sglang.formats.checkpoint import IN_FILES, WeightReader, integer, number, read_weights, trunk
from whiflash_sglang.formats.choice import SharedVocabulary, TargetsParts
from whiflash_sglang.formats.config_json import misfit
from whiflash_sglang.formats.draft_format import DraftFormat
from whiflash_sglang.formats.layers import Attend, Attention, AttentionShape, RMSNorm, Rotary, SwiGLU
from whiflash_sglang.formats.packed import Linear

GATHERING = 3
"""Memory accesses per gathered weight: it is read, written and read again."""


class Routed(NamedTuple):
    """Settings of a layer of experts. experts: their number, in `groups` groups; each row uses `chosen` experts of its
    best `open_groups` groups. intermediate_size: of an expert. shared_size: of the expert of all rows, 0 for none.
    normalised: whether the weights of a row's experts sum to one before they are multiplied by `scale`.
    """

    experts: int
    chosen: int
    groups: int
    open_groups: int
    intermediate_size: int
    shared_size: int
    normalised: bool
    scale: float


def read_routed(path: Path, config: Mapping[str, Any]) -> Routed:
    """Read the experts' settings of a GLM-4.5 layer. Raises `CheckpointError` naming the key that does not fit."""
    for key, served in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("hidden_act", "silu")):
        if config.get(key, served) != served:
            raise misfit(path, f"{key} {config[key]!r} is not supported, only {served}")
    size = integer(config, "moe_intermediate_size", path)
    return Routed(
        experts=integer(config, "n_routed_experts", path),
        chosen=integer(config, "num_experts_per_tok", path),
        groups=integer(config, "n_group", path, default=1),
        open_groups=integer(config, "topk_group", path, default=1),
        intermediate_size=size,
        shared_size=size * integer(config, "n_shared_experts", path, minimum=0, default=0),
        normalised=bool(config.get("norm_topk_prob", True)),
        scale=number(config, "routed_scaling_factor", path, default=1.0),
    )


class Experts(nn.Module):
    """SwiGLU experts, chosen as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): by sigmoids, with a bias that changes
    which experts are chosen but not their weights.

    Attributes:
        gate: [E, H], and bias: [E], in float32 whatever the dtype of other weights, so they are no parameters, which
            are rounded. gate_up: [E, 2I, H]; down: [E, I, H].
    """

    gate: Tensor
    bias: Tensor

    def __init__(self, hidden: int, routed: Routed) -> None:
        super().__init__()
        self.routed = routed
        self.gate_up = nn.Parameter(torch.empty(routed.experts, 2 * routed.intermediate_size, hidden))
        self.down = nn.Parameter(torch.empty(routed.experts, routed.intermediate_size, hidden))
        self.shared = SwiGLU(hidden, routed.shared_size) if routed.shared_size else None

    def fill(self, reader: WeightReader, prefix: str) -> None:
        """Read the weights whose names begin with `prefix` into the parameters, on the parameters' device."""
        device = self.down.device
        gate_up, down = self.gate_up.detach(), self.down.detach()
        experts, hidden = self.routed.experts, down.shape[2]
        self.gate = reader.tensor(f"{prefix}gate.weight", (experts, hidden)).to(device, torch.float32)
        bias = reader.tensor(f"{prefix}gate.e_score_correction_bias", (experts,))
        self.bias = bias.to(device, torch.float32)
        for expert in range(self.routed.experts):
            own = f"{prefix}experts.{expert}."
            reader.fill(gate_up[expert], f"{own}gate_proj.weight", f"{own}up_proj.weight")
            reader.fill(down[expert].t(), f"{own}down_proj.weight")
        if self.shared is not None:
            shared = (f"{prefix}shared_experts.{name}_proj.weight" for name in ("gate", "up"))
            reader.fill(self.shared.gate_up.weight, *shared)
            reader.fill(self.shared.down.weight, f"{prefix}shared_experts.down_proj.weight")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the experts to `x`, [T, H] → [T, H]."""
        weights, ids = self.route(x)
        mixed = self._gathered(x, weights, ids) if self._few(len(x)) else self._all(x, weights, ids)
        return mixed if self.shared is None else mixed + self.shared(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of rows `x` [T, H]: weights [T, chosen] float32 and experts [T, chosen] int64."""
        routed = self.routed
        scores = torch.sigmoid(x.float() @ self.gate.t())
        biased = scores + self.bias
        if routed.groups > 1:
            grouped = biased.view(len(x), routed.groups, -1)
            strongest = grouped.topk(2, dim=-1).values.sum(-1).topk(routed.open_groups, dim=-1).indices
            closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, strongest, value=False)
            biased = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
        ids = biased.topk(routed.chosen, dim=-1).indices
        weights = scores.gather(1, ids)
        if routed.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * routed.scale, ids

    def peak_bytes(self, rows: int) -> int:
        """Return the largest number of bytes that a pass over `rows` rows holds besides the weights."""
        experts, _, hidden = self.down.shape
        size = self.routed.intermediate_size
        of_a_row = (2 * size * hidden) if self._few(rows) else 3 * experts * size
        return rows * of_a_row * self.down.element_size()

    def _few(self, rows: int) -> bool:
        """Whether gathering the weights of each row's experts moves less than reading those of all experts."""
        return GATHERING * rows * self.routed.chosen <= self.routed.experts

    def _gathered(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        mixed = torch.zeros_like(x)
        for place in range(self.routed.chosen):
            own = ids[:, place]
            inner = silu_and_mul(torch.bmm(self.gate_up[own], x[:, :, None])[..., 0])
            inner = inner * weights[:, place, None].to(x.dtype)
            mixed = mixed + torch.bmm(inner[:, None], self.down[own])[:, 0]
        return mixed

    def _all(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Compute two products over all experts; an expert that is not chosen has weight 0."""
        dense = torch.zeros(len(x), self.routed.experts, device=x.device).scatter(1, ids, weights)
        inner = silu_and_mul((x @ self.gate_up.flatten(0, 1).t()).view(len(x) * self.routed.experts, -1))
        inner = inner.view(len(x), self.routed.experts, -1) * dense[..., None].to(x.dtype)
        mixed: Tensor = inner.flatten(1) @ self.down.flatten(0, 1)
        return mixed


COUNT = "num_nextn_predict_layers"
POSITIONS, EPS = 32768, 1e-6
"""Defaults of `max_position_embeddings` and `rms_norm_eps`, for targets that name none."""


PARTS = ("embedding_norm", "hidden_norm", "projection", "norm")
"""A head's modules outside its decoder layer."""
DEEPSEEK = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
MIMO = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
"""Names of `PARTS` in a target's files, without the prefix."""


@dataclass(frozen=True, slots=True)
class MTPConfig:
    """Sizes and variants of a target's own next-token head.

    Attributes:
        prefix: beginning of its tensors' names in the target's files. names: of its `PARTS`.
        hidden_first: the projection's input is [state; embedding] in files, not [embedding; state].
        attention: head counts and head size.
        routed: its experts; None: it has one MLP of `intermediate_size`.
        head_norms: queries and keys are normed. blank_first: at position 0 no embedding is read.
    """

    prefix: str
    names: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    attention: AttentionShape
    routed: Routed | None
    vocab_size: int
    rope: dict[str, Any]
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool = False
    head_norms: bool = False
    blank_first: bool = False
    hidden_first: bool = False

    @property
    def target_hidden_size(self) -> int:
        """The target's hidden size, which is the head's own, because the head is part of the target."""
        return self.hidden_size

    @property
    def num_layers(self) -> int:
        """Number of decoder layers with K and V: one."""
        return 1

    def layers_of(self, num_target_layers: int) -> tuple[int, ...]:
        """Return the id of the state after the target's final norm, which SGLang passes to a next-token head."""
        return (num_target_layers,)


def parse_mimo(path: Path, config: Mapping[str, Any]) -> MTPConfig:
    """Read MiMo's head, a Qwen2 layer in `model.mtp_layers`. Raises `CheckpointError` naming the key at fault."""
    _check(path, config)
    return MTPConfig(
        prefix="model.mtp_layers.0.",
        names=MIMO,
        intermediate_size=integer(config, "intermediate_size", path),
        routed=None,
        attention_bias=True,
        blank_first=True,
        hidden_first=True,
        **trunk(config, path, positions=POSITIONS, eps=EPS),
    )


def parse_glm(path: Path, config: Mapping[str, Any]) -> MTPConfig:
    """Read GLM-4.5's head, one more layer with experts. Raises `CheckpointError` naming the key that does not fit."""
    _check(path, config)
    rotated = {"partial_rotary_factor": 0.5} | dict(config)
    return MTPConfig(
        prefix=f"model.layers.{integer(config, 'num_hidden_layers', path)}.",
        names=DEEPSEEK,
        intermediate_size=0,
        routed=read_routed(path, config),
        attention_bias=bool(config.get("attention_bias", False)),
        head_norms=bool(config.get("use_qk_norm", False)),
        **trunk(rotated, path, positions=POSITIONS, eps=EPS),
    )


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if the target has no next-token head, several, or a quantised one."""
    count = config.get(COUNT) or 0
    if not count:
        raise misfit(path, f"{COUNT} is {config.get(COUNT)}: this target has no next-token head of its own")
    if count != 1:
        raise misfit(path, f"{COUNT} is {count}; only one next-token head is supported")
    if config.get("quantization_config"):
        raise misfit(path, "quantization_config: the next-token head of a quantised target is not supported")


class MTPDrafter(TargetsParts):
    """A chain drafter of one decoder layer that uses the loaded target's embedding and head."""

    config: MTPConfig

    def __init__(
        self,
        config: MTPConfig,
        target_embedding: Tensor,
        target_lm_head: Tensor,
        shared: SharedVocabulary | None = None,
    ) -> None:
        super().__init__(target_embedding, target_lm_head)
        self.config, self.shared = config, shared
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm, self.hidden_norm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.projection = Linear(2 * size, size, bias=False)
        self.input_norm = RMSNorm(size, eps)
        self.attention = Attention(
            size,
            size,
            config.attention,
            head_norm_eps=eps if config.head_norms else None,
            bias=config.attention_bias,
            out_bias=False,
        )
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp: SwiGLU | Experts = (
            SwiGLU(size, config.intermediate_size) if config.routed is None else Experts(size, config.routed)
        )
        self.norm = RMSNorm(size, eps)
        self.rotary = Rotary(config.rope, config.attention.head_dim, config.max_position_embeddings)

    @property
    def draft_vocab_size(self) -> int:
        """Number of tokens that the head can draft: the whole vocabulary."""
        return self.config.vocab_size

    def fuse(self, features: Tensor) -> Tensor:
        """Return the target's states [T, H] unchanged, since there is nothing to fuse."""
        return features

    def keys_values(self, tokens: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute k and v, each [T, Hkv, D], from next-token ids [T], the target's states [T, H] and positions [T]."""
        entry = self._entry(tokens, hidden, positions)
        return self.attention.keys_values(self.input_norm(entry), self.rotary.angles(positions))

    def forward(self, tokens: Tensor, hidden: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Run one draft step, with the parameters of `Eagle3Drafter.forward`; states are the target's or fed back."""
        angles = self.rotary.angles(positions)
        residual = self._entry(tokens, hidden, positions)
        residual = residual + self.attention(self.input_norm(residual), angles, 0, attend)
        residual = residual + self.mlp(self.mlp_norm(residual))
        normed = self.norm(residual)
        return normed, normed

    def peak_bytes(self, rows: int) -> int:
        """Return the largest number of bytes that the experts hold for a draft pass of `rows` rows."""
        return self.mlp.peak_bytes(rows) if isinstance(self.mlp, Experts) else 0

    def _entry(self, tokens: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        embedded = self.embed(tokens).to(hidden.dtype)
        if self.config.blank_first:
            embedded = embedded.masked_fill((positions == 0)[:, None], 0)
        entry: Tensor = self.projection(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], dim=-1))
        return entry

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
        config: MTPConfig,
    ) -> "MTPDrafter":
        """Read the head from the target's own directory. Raises CheckpointError naming what does not fit."""
        reader = WeightReader(path, read_weights(path, config.prefix))
        with reader.modules(dtype):
            drafter = cls(config, target_embedding, target_lm_head, shared)
        drafter = drafter.to(device=device, dtype=dtype)
        drafter._fill(reader)
        return drafter.eval()

    def _fill(self, reader: WeightReader) -> None:
        prefix = self.config.prefix
        own = {part: (name,) for part, name in zip(PARTS, self.config.names, strict=True)}
        experts = isinstance(self.mlp, Experts)
        plain = {name: p for name, p in self.named_parameters() if not (experts and name.startswith("mlp."))}
        reader.fill_layer(plain, prefix, {**IN_FILES, **own})
        if self.config.hidden_first:
            with torch.no_grad():
                self.projection.weight.copy_(torch.cat(self.projection.weight.chunk(2, 1)[::-1], 1))
        if isinstance(self.mlp, Experts):
            self.mlp.fill(reader, f"{prefix}mlp.")


_format = partial(DraftFormat, arm=arms.AR, layers_key=None, model=MTPDrafter, upstream="EAGLE")
FORMATS = (
    _format(
        "MiMo's own head",
        keys=("MiMoForCausalLM",),
        read=parse_mimo,
        published="XiaomiMiMo, in the target",
        defined_by="SGLang's `mimo_mtp.py`",
    ),
    _format(
        "GLM-4.5's own head",
        keys=("Glm4MoeForCausalLM",),
        read=parse_glm,
        published="zai-org (GLM-4.5, 4.6, 4.7), in the target",
        defined_by="SGLang's `glm4_moe_nextn.py`",
    ),
)
