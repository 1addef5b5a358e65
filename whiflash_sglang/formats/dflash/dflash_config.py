"""Read a block drafter's `config.json`: the `DFlashDraftModel` format, and the keys that later formats share.

As in `parse_dflash_draft_config` of SGLang 0.5.23, a key in `dflash_config` wins over the same key at the top level.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from whiflash_sglang.formats.checkpoint import MOST_LAYERS, MOST_ROWS, integer, layer_ids, number, trunk, trunk_json
from whiflash_sglang.formats.config_json import misfit
from whiflash_sglang.formats.draft_format import merged
from whiflash_sglang.formats.layers import AttentionShape

ARCHITECTURE = "DFlashDraftModel"
ALIASES = ("MuseGlimmerAssistantModel",)
"""Names of other architectures for the same model."""
DEFAULT_BLOCK = 16
"""Block size of a checkpoint that names none, as in SGLang."""

_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "selector_rank": (None, 0),
    "output_multiplier": (None, 1.0),
    "final_logit_softcapping": (None, 0.0),
    "attention_sink_bias": (None, False),
    "has_embed_tokens": (None, False),
    "xpress_candidate_topc": (None, 0),
}
"""Setting that only some formats support → the values with which it changes nothing."""


class LayerSpan(NamedTuple):
    """The entries that a block's row sees in one layer. causal: no later rows of its block. window: largest number of
    entries before it, None for all; a window is always causal.
    """

    causal: bool = False
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DFlashConfig:
    """Sizes and variants of a block drafter's checkpoint.

    Attributes:
        block_size: rows of a draft pass, the bonus token's included.
        mask_token_id: the token at the positions to be drafted.
        target_layer_ids: target layers whose outputs are concatenated, in this order; empty: SGLang's default.
            num_target_layers: the target's number of layers, None if the checkpoint does not say.
        spans: the entries that a row sees, by layer; empty: all entries in every layer.
        from_anchor: the bonus token's row drafts too, so that a block gives as many drafts as it has rows.
        draft_vocab_size: rows of the drafter's own head; None: it uses the target's head.
        value_scale: factor of V. neighbours: RoPE rotates pairs of neighbouring dimensions, not halves.
        clamped: alpha and limit of `layers.SwiGLU`. convolution: taps and group of `dflash.BlockConv`, which is around
            the sublayers of every layer, or None.
        head_norm_eps: of the norms of queries and keys; None: `rms_norm_eps`.
    """

    hidden_size: int
    intermediate_size: int
    attention: AttentionShape
    num_layers: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    rope: dict[str, Any]
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    spans: tuple[LayerSpan, ...] = ()
    from_anchor: bool = False
    draft_vocab_size: int | None = None
    attention_bias: bool = False
    gemma_norm: bool = False
    value_scale: float = 1.0
    neighbours: bool = False
    clamped: tuple[float, float] | None = None
    convolution: tuple[int, int] | None = None
    head_norm_eps: float | None = None
    anchored: ClassVar[bool] = False
    """Whether every draft pass has a whole block of rows that see the bonus token's entry as context (FlashMap)."""

    @property
    def num_features(self) -> int:
        """Number of captured features that `fc` reads."""
        return len(self.target_layer_ids) or self.num_layers

    @property
    def max_drafts(self) -> int:
        """Largest number of tokens that one block drafts."""
        return self.block_size if self.from_anchor else self.block_size - 1

    def rows(self, drafts: int) -> int:
        """Return the number of rows of a draft pass that gives `drafts` drafts."""
        return self.block_size if self.anchored else drafts + (not self.from_anchor)

    @property
    def target_hidden_size(self) -> int:
        """Size of one captured feature: the target's hidden size."""
        return self.hidden_size

    def layers_of(self, num_target_layers: int) -> tuple[int, ...]:
        """Return the target layers whose outputs are read: those of the checkpoint, else evenly from 1 to L-3."""
        if self.target_layer_ids:
            return self.target_layer_ids
        if self.num_layers == 1:
            return (num_target_layers // 2,)
        span = num_target_layers - 4
        return tuple(round(1 + index * span / (self.num_layers - 1)) for index in range(self.num_layers))

    def to_json(self) -> dict[str, Any]:
        """Return the `config.json` for SGLang. Raises ValueError for variants, which can only be read."""
        if self.variant or self.from_anchor or type(self) is not DFlashConfig:
            raise ValueError("only plain DFlash drafters are written")
        layers = {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids) or None}
        return {
            **self.trunk_json(),
            "architectures": [ARCHITECTURE],
            "block_size": self.block_size,
            "dflash_config": layers,
        }

    def trunk_json(self) -> dict[str, Any]:
        """Return the `config.json` keys that all block formats share."""
        return {
            **trunk_json(self),
            "model_type": "qwen3",
            "attention_bias": False,
            "layer_types": ["full_attention"] * self.num_layers,
            "num_target_layers": self.num_target_layers,
        }

    @property
    def variant(self) -> bool:
        """Whether a layer of the trunk, or its draft vocabulary, differs from the published DFlash model."""
        others = ("rms_norm_eps", "max_position_embeddings", "from_anchor")
        variants = (field for field in fields(DFlashConfig) if field.default is not MISSING)
        return any(getattr(self, field.name) != field.default for field in variants if field.name not in others)


C = TypeVar("C", bound=DFlashConfig)


def parse(path: Path, config: Mapping[str, Any], kind: type[C], *, known: tuple[str, ...] = (), **decided: Any) -> C:
    """Read a block drafter's configuration from a `config.json` in z-lab's layout; nested keys win.

    Args:
        kind: class of the result. known: keys of `_PLAIN_VALUES` that the caller reads itself. decided: fields that
            the caller adds or sets.

    Raises:
        CheckpointError: naming the field that does not fit, or the variant that this format has no draft pass for.
    """
    settings = merged(path, config, "text_config", "dflash_config")
    for key, plain in _PLAIN_VALUES.items():
        if key not in known and settings.get(key) not in plain:
            why = f"belongs to a drafter that is not supported in this format (supported: {plain[-1]!r})"
            raise misfit(path, f"{key} {settings[key]!r} {why}")
    layers = integer(settings, "num_hidden_layers", path, maximum=MOST_LAYERS)
    parsed = {
        **trunk(settings, path, positions=32768, eps=1e-6),
        "intermediate_size": integer(settings, "intermediate_size", path),
        "mask_token_id": _mask(path, settings),
        **_target_layers(path, settings),
        "num_layers": layers,
        "spans": _spans(path, settings, layers),
        "attention_bias": bool(settings.get("attention_bias", False)),
        "gemma_norm": bool(settings.get("use_gemma_norm", False)),
        "value_scale": number(settings, "attention_value_scale", path, default=1.0),
        "neighbours": not settings.get("rope_is_neox_style", settings.get("is_neox_style", True)),
        "clamped": _activation(path, settings),
        "convolution": _convolution(path, settings),
    }
    if "block_size" not in decided:
        decided["block_size"] = integer(
            settings, "block_size", path, minimum=2, maximum=MOST_ROWS, default=DEFAULT_BLOCK
        )
    return kind(**{**parsed, **decided})


def _mask(path: Path, settings: Mapping[str, Any]) -> int:
    vocab, mask = integer(settings, "vocab_size", path), settings.get("mask_token_id")
    if not isinstance(mask, int) or isinstance(mask, bool) or not 0 <= mask < vocab:
        unnamed = " (a mask_token without its id is not looked up)" if mask is None else ""
        raise misfit(path, f"mask_token_id {mask!r} is not in the target's vocabulary of {vocab}{unnamed}")
    return mask


def _target_layers(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    named, count = settings.get("target_layer_ids"), settings.get("num_target_layers")
    layers = () if named is None else layer_ids(settings, "target_layer_ids", path)
    if count is not None:
        count = integer(settings, "num_target_layers", path)
        if wrong := [layer for layer in layers if not 0 <= layer < count]:
            there = f"the target has layers 0 to {count - 1}"
            raise misfit(path, f"target_layer_ids names layers {wrong}; {there}")
    return {"target_layer_ids": layers, "num_target_layers": count}


def _spans(path: Path, settings: Mapping[str, Any], layers: int) -> tuple[LayerSpan, ...]:
    """Return each layer's span, by SGLang's rules: full layers see the whole block, sliding layers only earlier
    entries, unless `is_causal` says otherwise. Hugging Face's window counts the token itself.
    """
    kinds, causal = settings.get("layer_types"), settings.get("is_causal")
    if kinds is None:
        return ()
    if not isinstance(kinds, list) or len(kinds) < layers:
        raise misfit(path, f"layer_types must name {layers} layers, got {kinds!r}")
    spans = []
    for kind in kinds[:layers]:
        if kind == "full_attention":
            spans.append(LayerSpan(bool(causal)))
        elif kind != "sliding_attention":
            raise misfit(path, f"layer_types names {kind!r}; full_attention and sliding_attention are supported")
        elif causal is False:
            raise misfit(path, "is_causal false with sliding_attention is not supported: windows look back only")
        else:
            spans.append(LayerSpan(True, integer(settings, "sliding_window", path) - 1))
    return tuple(spans) if set(spans) != {LayerSpan()} else ()


def _activation(path: Path, settings: Mapping[str, Any]) -> tuple[float, float] | None:
    name = settings.get("hidden_act", "silu")
    if name == "silu":
        return None
    if name == "swigluoai":
        return number(settings, "swiglu_alpha", path), number(settings, "swiglu_limit", path)
    raise misfit(path, f"hidden_act {name!r} is not supported, only silu and swigluoai")


def _convolution(path: Path, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    taps, group = (integer(settings, f"conv_{name}_size", path, minimum=0, default=0) for name in ("kernel", "group"))
    if not taps and not group:
        return None
    hidden = integer(settings, "hidden_size", path)
    if not taps or not group or hidden % group:
        why = f"go together, and the latter divides hidden_size {hidden}"
        raise misfit(path, f"conv_kernel_size {taps} and conv_group_size {group} {why}")
    return taps, group
