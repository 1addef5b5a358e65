"""Read checkpoints of RedHat's speculators: EAGLE-3, DFlash, DSpark and xPress, with a `transformer_layer_config`.

`speculators_model_type` names the format. A layer id names the target's layer that *reads* the captured state, so the
layer before it put it out. A reduced `draft_vocab_size` comes with a head of its own and `d2t`. Follows the classes of
vllm-project/speculators, which SGLang 0.5.23 does not load.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from whiflash_sglang.drafts import arms
from whiflash_sglang.formats import eagle3
from whiflash_sglang.formats.checkpoint import MOST_ROWS, integer, layer_ids
from whiflash_sglang.formats.config_json import misfit
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.dflash.dflash_config import C, DFlashConfig, parse
from whiflash_sglang.formats.dflash.dspark import DSparkConfig, DSparkDrafter, read_heads
from whiflash_sglang.formats.dflash.xpress import XPressConfig, XPressDrafter, read_refiner
from whiflash_sglang.formats.draft_format import DraftFormat, Json
from whiflash_sglang.formats.eagle3 import Eagle3Config, Eagle3Drafter

_WINDOW_KEYS = ("layer_types", "sliding_window", "use_sliding_window")
Heads = Callable[[Path, Json], dict[str, Any]]


def read_block(path: Path, config: Json, kind: type[C], heads: Heads | None = None, from_anchor: bool = False) -> C:
    """Read a block drafter's configuration as a `kind`. heads: reads further fields. from_anchor: its default value.
    Raises CheckpointError naming the field that does not fit.
    """
    settings = _decoder(path, config) | {key: value for key, value in config.items() if value is not None}
    if settings.get("sliding_window_non_causal") and "sliding_attention" in (settings.get("layer_types") or ()):
        raise misfit(path, "sliding_window_non_causal is not supported: windows look back only")
    fields = {
        "target_layer_ids": _outputs(path, settings, "aux_hidden_state_layer_ids"),
        "from_anchor": bool(settings.get("sample_from_anchor", from_anchor)),
        "block_size": integer(settings, "block_size", path, minimum=2, maximum=MOST_ROWS, default=8),
        "draft_vocab_size": _reduced(path, settings, settings),
        "num_target_layers": None,
    }
    return parse(path, settings, kind, **(heads(path, settings) if heads else {}) | fields)


def read_eagle3(path: Path, config: Json) -> Eagle3Config:
    """Read an `Eagle3Speculator` or `PEagleSpeculator`. Raises CheckpointError naming the field that does not fit."""
    layer = _decoder(path, config)
    key = eagle3.LAYERS_KEY
    named = _outputs(path, config, key) if config.get(key) else ()
    before = config.get("norm_before_residual")
    if not isinstance(before, bool):
        raise misfit(path, f"norm_before_residual must be true or false, got {before!r}")
    if "sliding_attention" in (layer.get("layer_types") or ()):
        raise misfit(path, "layer_types of an EAGLE-3 drafter must be full_attention; windows are not supported")
    flags = {name: bool(config.get(name, False)) for name in ("norm_before_fc", "fc_norm", "norm_output")}
    parallel = config["speculators_model_type"] == "peagle"
    token = {"ptd_token_id": integer(config, "mask_token_id", path, minimum=0)} if parallel else {}
    read = eagle3.parse(
        path,
        {**layer, **flags, "draft_vocab_size": _reduced(path, config, layer), "tie_word_embeddings": False} | token,
    )
    return replace(
        read,
        target_layer_ids=named,
        num_features=len(named) or 3,
        norm_before_residual=before,
        head_norms=layer["model_type"] == "qwen3",
        upper_norm="input_layernorm",
        attention_bias=bool(layer.get("attention_bias", False)),
        own_embedding=read.own_embedding or bool(config.get("embed_requires_grad", False)),
    )


def _decoder(path: Path, config: Json) -> dict[str, Any]:
    """Return `transformer_layer_config` with the defaults of its class, which files leave out."""
    said = config.get("transformer_layer_config")
    kind = said.get("model_type") if isinstance(said, dict) else None
    if not isinstance(said, dict) or kind not in ("qwen3", "llama"):
        raise misfit(path, f"transformer_layer_config must be a qwen3 or llama decoder, got model_type {kind!r}")
    whole = AutoConfig.for_model(**said).to_dict()
    rope = whole.get("rope_parameters") or {}
    if "sliding_attention" in rope:  # one entry per kind of layer; the drafter uses this one
        whole["rope_parameters"] = rope["sliding_attention"]
    return {**whole, **{key: said[key] for key in _WINDOW_KEYS if said.get(key) is not None}}


def _outputs(path: Path, settings: Json, key: str) -> tuple[int, ...]:
    """Return the layers whose outputs are captured, from the ids of the layers that read them."""
    layers = layer_ids(settings, key, path)
    if 0 in layers:
        raise misfit(path, f"{key} asks for the embedding (0), which is not captured")
    return tuple(layer - 1 for layer in layers)


def _reduced(path: Path, config: Json, layer: Json) -> int | None:
    """Return the rows of the drafter's own head; None if it drafts the whole vocabulary, with the target's head."""
    rows = integer(config, "draft_vocab_size", path)
    return None if rows == integer(layer, "vocab_size", path) else rows


_format = partial(DraftFormat, published="RedHatAI", defined_by="speculators", upstream=None)
_block = partial(_format, arm=arms.DIFFUSION, layers_key="aux_hidden_state_layer_ids")
_read = partial(partial, read_block)
FORMATS = (
    _block("speculators DFlash", keys=("speculators/dflash",), read=_read(kind=DFlashConfig), model=DFlashDrafter),
    _block(
        "speculators DSpark",
        keys=("speculators/dspark",),
        read=_read(kind=DSparkConfig, heads=read_heads, from_anchor=True),
        model=DSparkDrafter,
    ),
    _block(
        "speculators xPress",
        keys=("speculators/xpress",),
        read=_read(kind=XPressConfig, heads=read_refiner),
        model=XPressDrafter,
        published="speculators",
    ),
    _format(
        "speculators EAGLE-3, P-EAGLE",
        arm=arms.AR,
        keys=("speculators/eagle3", "speculators/peagle"),
        layers_key=eagle3.LAYERS_KEY,
        read=read_eagle3,
        model=Eagle3Drafter,
    ),
)
