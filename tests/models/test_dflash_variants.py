"""Every variant of `DFlashDraftModel`, served by our arm, drafts what SGLang 0.5.23's class drafts from its files."""

from pathlib import Path
from typing import Any

import published
import pytest
import torch
from served_blocks import BONUS, LENGTHS, Served, serve
from torch import Tensor
from upstream_drafts import UpstreamBlocks, blocks, load, one_rank

from whiflash_sglang.formats.layers import rotary_width

LAYERS, BLOCK = 3, 8
NESTED = {
    "block_size": BLOCK,
    "mask_token_id": published.MASK,
    "target_layer_ids": [1, 4, 8],
    "num_target_layers": published.TARGET_LAYERS,
}
BASE = published.QWEN3 | {"architectures": ["DFlashDraftModel"], "num_hidden_layers": LAYERS}
SWA = ["sliding_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
OF_THE_TARGET = {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True}

VARIANTS: dict[str, dict[str, Any]] = {
    "z-lab Qwen3: block at the top level": {"block_size": BLOCK, "num_target_layers": published.TARGET_LAYERS}
    | {"dflash_config": {"mask_token_id": published.MASK, "target_layer_ids": [1, 4, 8]}},
    "z-lab Qwen3.5: all nested": {"dflash_config": NESTED},
    "all at the top level": NESTED,
    "nested goes first": {"block_size": 4, "mask_token_id": 9, "dflash_config": NESTED},
    "layers not named": {"dflash_config": {k: v for k, v in NESTED.items() if k != "target_layer_ids"}},
    "layers out of order": {"dflash_config": NESTED | {"target_layer_ids": [8, 1, 4]}},
    "more features than layers": {"dflash_config": NESTED | {"target_layer_ids": [0, 1, 3, 5, 8]}},
    "block not named": {"dflash_config": {k: v for k, v in NESTED.items() if k != "block_size"}},
    "z-lab Qwen3.6: sliding windows": {"dflash_config": NESTED, "layer_types": SWA}
    | {"use_sliding_window": True, "sliding_window": 5},
    "causal": {"dflash_config": NESTED, "layer_types": ["full_attention"] * LAYERS, "is_causal": True},
    "yarn": {"dflash_config": NESTED, "rope_scaling": YARN},
    "llama3 rope": {"dflash_config": NESTED, "rope_scaling": LLAMA3},
    "linear rope": {"dflash_config": NESTED, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "half a head rotated": {"dflash_config": NESTED, "partial_rotary_factor": 0.5},
    "rope_dim before the target's": {"dflash_config": NESTED}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "rope_dim": 8, **OF_THE_TARGET}},
    "neighbours rotate": {"dflash_config": NESTED, "rope_is_neox_style": False},
    "neighbours, half a head": {"dflash_config": NESTED, "is_neox_style": False, "partial_rotary_factor": 0.5},
    "biases": {"dflash_config": NESTED, "attention_bias": True},
    "Gemma's norms": {"dflash_config": NESTED, "use_gemma_norm": True},
    "MiMo: scaled values": {"dflash_config": NESTED | {"attention_value_scale": 0.707}},
    "MiniMax: swigluoai": {"dflash_config": NESTED}
    | {"hidden_act": "swigluoai", "swiglu_alpha": 1.702, "swiglu_limit": 0.9},
    "convolutions": {"dflash_config": NESTED | {"conv_kernel_size": 3, "conv_group_size": 16}},
    "Muse": {"dflash_config": NESTED, "architectures": ["MuseGlimmerAssistantModel"]},
}


def checkpoint(path: Path, changes: dict[str, Any], **how: Any) -> Path:
    config = BASE | changes
    settings = config | config.get("dflash_config", {})
    features = len(settings.get("target_layer_ids") or range(LAYERS))
    shapes = published.block_trunk(LAYERS, features, bias=config["attention_bias"])
    if "conv_kernel_size" in settings:
        shapes |= published.convolutions(LAYERS, settings["conv_kernel_size"], settings["conv_group_size"])
    return published.write(path, config, published.draw(shapes), **how)


def compare(path: Path, served: Served) -> None:
    """KV of the context, states and drafts of every request."""
    from sglang.srt.models import dflash

    config = served.draft.config
    architecture = served.draft.format.keys[0]
    with one_rank(), torch.no_grad():
        upstream = UpstreamBlocks(load(path, getattr(dflash, architecture)), published.target_tensors()[0])
        inputs = blocks(LENGTHS, BONUS, config.mask_token_id, served.states.shape[1])
        for row, length in enumerate(LENGTHS):
            context = upstream.keys_values(served.features[row], torch.arange(length))
            torch.testing.assert_close(served.context[row], turned(config, context), rtol=1e-4, atol=1e-4)
            # Training computes it by these.
            fused, places = served.arm.model.fuse(served.features[row]), torch.arange(length)
            trained = served.arm.model.keys_values(fused, places)
            torch.testing.assert_close(trained, served.context[row], rtol=1e-4, atol=1e-4)
            states = upstream.states(inputs[row], context)
            torch.testing.assert_close(served.states[row], states, rtol=1e-4, atol=1e-4)
            logits = states[1:] @ published.target_tensors()[1].T
            assert served.tokens[row].tolist() == logits.argmax(-1).tolist()
            sure = logits.softmax(-1).max(-1).values
            torch.testing.assert_close(served.confidences[row], sure, rtol=1e-3, atol=1e-4)


def turned(config: Any, context: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """SGLang's KV as ours lies: keys whose neighbours rotate together are kept with their halves apart."""
    keys, values = context
    width = rotary_width(config.rope, published.HEAD_DIM)
    if config.neighbours:
        keys = torch.cat([keys[..., 0:width:2], keys[..., 1:width:2], keys[..., width:]], -1)
    return keys, values


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_drafts_what_sglang_drafts(variant: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "draft", VARIANTS[variant])
    compare(path, serve(path))


@pytest.mark.parametrize("files", ["sharded", "bin"])
def test_weights_come_in_several_files_or_as_a_pickle_of_tensors(files: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "draft", {"dflash_config": NESTED}, files=files)
    assert torch.equal(serve(path).states, serve(checkpoint(tmp_path / "whole", {"dflash_config": NESTED})).states)


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"model.{name}",
        lambda name: {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}.get(
            name, name
        ),
    ],
    ids=["prefix", "vendor"],
)
def test_tensors_go_by_other_names(renamed: Any, tmp_path: Path) -> None:
    config, tensors = BASE | {"dflash_config": NESTED}, published.draw(published.block_trunk(LAYERS, 3))
    path = published.write(tmp_path / "draft", config, {renamed(name): value for name, value in tensors.items()})
    compare(path, serve(path))


def test_a_trained_mask_embedding_stands_at_the_masks(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "draft", {"dflash_config": NESTED})
    trained = torch.randn(published.HIDDEN, generator=torch.Generator().manual_seed(5))
    torch.save({"embedding": trained, "mask_token_id": published.MASK}, path / "mask_embedding.pt")
    served = serve(path)
    from sglang.srt.models.dflash import DFlashDraftModel

    merged = published.target_tensors()[0]
    merged[published.MASK] = trained  # as SGLang's worker merges it into the target's table
    with one_rank(), torch.no_grad():
        upstream = UpstreamBlocks(load(path, DFlashDraftModel), merged)
        for row, tokens in enumerate(blocks(LENGTHS, BONUS, published.MASK, BLOCK)):
            states = upstream.states(tokens, served.context[row])
            torch.testing.assert_close(served.states[row], states, rtol=1e-4, atol=1e-4)
