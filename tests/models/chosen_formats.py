"""Tiny random checkpoints of Domino, DFlash2, xPress, FlashMap and speculators, as their files name things."""

from collections.abc import Callable
from typing import Any

import torch
from formulas import QK_EPS
from published import HEAD_DIM, HIDDEN, MASK, QWEN3, TARGET_LAYERS, VOCAB, Shapes, block_trunk, convolutions, draw
from torch import Tensor

LAYERS, BLOCK, STATE, RANK, TOP, WIDTH, TIME = 2, 8, 24, 12, 5, 48, 10
TRUNK = {"mask_token_id": MASK, "target_layer_ids": [1, 4, 8]}
BASE = QWEN3 | {"num_hidden_layers": LAYERS, "num_target_layers": TARGET_LAYERS, "block_size": BLOCK}
OF_DOMINO = TRUNK | {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "emb_dim": RANK,
    "gru_hidden_dim": STATE,
    "shift_label": True,
}
DOMINO = BASE | {"architectures": ["DominoDraftModel"], "emb_dim": RANK, "dflash_config": OF_DOMINO}
"""SpecForge's configs/qwen3-8b-domino.json."""
OF_DFLASH2 = TRUNK | {
    "conv_kernel_size": 3,
    "conv_group_size": 16,
    "selector_rank": RANK,
    "selector_top_k": TOP,
    "output_multiplier": 1.5,
    "final_logit_softcapping": 30.0,
}
DFLASH2 = BASE | {"architectures": ["DFlash2DraftModel"], "dflash_config": OF_DFLASH2}
XPRESS = BASE | {"architectures": ["Qwen3XPressModel"], "dflash_config": TRUNK, "sample_from_anchor": False}
XPRESS |= {"xpress_rank": RANK, "xpress_mlp_hidden": 2 * RANK, "xpress_num_passes": 3}
"""Supercomputing-System-AI-Lab/xPress, `convert_xpress_to_vllm.py`: a DFlash's config.json, and these."""
REFINER: dict[str, tuple[str, tuple[int, ...]]] = {
    "w1.weight": ("token_embed.weight", (VOCAB, RANK)),
    "down_h.weight": ("down_h.weight", (RANK, HIDDEN)),
    "down_g.weight": ("down_g.weight", (RANK, HIDDEN)),
    "in_proj.weight": ("in_proj.weight", (RANK, 3 * RANK)),
    "mix.L": ("mix_l", (RANK, BLOCK, BLOCK)),
    "mlp.gate_proj.weight": ("mlp_gate.weight", (2 * RANK, RANK)),
    "mlp.up_proj.weight": ("mlp_up.weight", (2 * RANK, RANK)),
    "mlp.down_proj.weight": ("mlp_down.weight", (RANK, 2 * RANK)),
    "w2.weight": ("readout.weight", (VOCAB, RANK)),
}
"""Tensors of its head in these files, and in those of speculators 0.9.0 (`XPressRefinerHead`)."""
DRAFTED = 90
SIZES = {"hidden_size": WIDTH, "num_attention_heads": WIDTH // HEAD_DIM, "intermediate_size": 3 * WIDTH}
SIZES |= {"num_hidden_layers": LAYERS, "block_size": BLOCK, "cond_dim": RANK, "time_embed_dim": TIME}
FLASHMAP = SIZES | {"architectures": ["FlashMapDraftModel"], "model_type": "flashmap", "num_steps": 1}
FLASHMAP |= {"target_hidden_size": HIDDEN, "vocab_size": VOCAB, "draft_vocab_size": DRAFTED}
FLASHMAP |= {"target_layer_ids": [1, 4, 8], "rope_theta": 10000.0, "time_scale": 1000.0, "noise_gate": "jump"}
FLASHMAP |= {"rms_norm_eps": 1e-6, "qk_norm_eps": QK_EPS, "layer_norm_eps": 1e-6}
"""flashmap 0.1.0, `configuration_flashmap.py`."""
SPECULATOR = {
    "architectures": ["DFlashSpeculator"],
    "speculators_model_type": "dflash",
    "draft_vocab_size": DRAFTED,
    "block_size": 6,
    "aux_hidden_state_layer_ids": [2, 5, 9],
    "mask_token_id": MASK,
    "sliding_window_non_causal": False,
    "sample_from_anchor": False,
    "transformer_layer_config": QWEN3
    | {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS, "use_sliding_window": False},
}


def domino_tensors() -> dict[str, Tensor]:
    shapes: Shapes = block_trunk(LAYERS, 3) | {
        "prefix_gru.weight_ih_l0": (3 * STATE, HIDDEN),
        "prefix_gru.weight_hh_l0": (3 * STATE, STATE),
        "embed_proj.0.weight": (RANK, HIDDEN + STATE),
        "embed_proj.2.weight": (VOCAB, RANK),
    }
    drawn = draw(shapes)
    drawn["embed_proj.2.weight"] *= 20  # so that the tokens before matter
    return drawn


def dflash2_tensors(taps: int) -> dict[str, Tensor]:
    shapes: Shapes = block_trunk(LAYERS, 3) | {
        "candidate_selector.predecessor_codebook": (VOCAB, RANK),
        "candidate_selector.successor_codebook": (VOCAB, RANK),
        "candidate_selector.hidden_projection.weight": (RANK, HIDDEN),
    }
    drawn = draw(shapes | (convolutions(LAYERS, taps, 16) if taps else {}))
    drawn["candidate_selector.successor_codebook"] *= 20
    return drawn


def xpress_tensors() -> dict[str, Tensor]:
    shapes: Shapes = {f"xpress_head.{name}": shape for name, (_, shape) in REFINER.items()}
    drawn = draw(block_trunk(LAYERS, 3) | shapes)
    drawn["xpress_head.w1.weight"] *= 16
    return drawn


def flashmap_tensors() -> dict[str, Tensor]:
    """`modeling_flashmap.py`, and the ranking of ids in `draft_vocab.safetensors`."""
    linears = {"anchor_proj": (WIDTH, HIDDEN), "x_embed": (WIDTH, HIDDEN), "head": (HIDDEN, WIDTH)}
    linears["final_adaln.linear"] = (3 * WIDTH, RANK)
    for name in ("time_embed", "jump_embed"):
        linears |= {f"{name}.linear_1": (RANK, TIME), f"{name}.linear_2": (RANK, RANK)}
    shapes: Shapes = {"fc.weight": (WIDTH, 3 * HIDDEN), "noise_gate": (1,)}
    shapes |= {"hidden_norm.weight": (WIDTH,), "anchor_norm.weight": (WIDTH,)}
    shapes |= {"state_norm.weight": (HIDDEN,), "noise_norm.weight": (HIDDEN,)}
    for layer in (f"layers.{index}." for index in range(LAYERS)):
        linears |= {f"{layer}mlp.fc1": (3 * WIDTH, WIDTH), f"{layer}mlp.fc2": (WIDTH, 3 * WIDTH)}
        linears |= {f"{layer}{part}_adaln.linear": (3 * WIDTH, RANK) for part in ("self_attn", "cross_attn", "mlp")}
        for part in ("self_attn", "cross_attn"):
            shapes |= {f"{layer}{part}.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
            shapes |= {f"{layer}{part}.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return draw(shapes) | {"ids": torch.randperm(VOCAB, generator=torch.Generator().manual_seed(8))}


def of_speculators(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As speculators names the tensors of xPress."""
    names = {f"xpress_head.{name}": f"refiner_head.{theirs}" for name, (theirs, _) in REFINER.items()}
    return {names.get(name, name): tensor for name, tensor in weights.items()}


def reduced(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a head of its own over `DRAFTED` ids."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(8))[:DRAFTED].sort().values
    own = torch.randn(DRAFTED, HIDDEN, generator=torch.Generator().manual_seed(9))
    return weights | {"lm_head.weight": own, "d2t": ids - torch.arange(DRAFTED)}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "Domino": (DOMINO, domino_tensors),
    "DFlash2": (DFLASH2, lambda: dflash2_tensors(3)),
    "XPress": (XPRESS, xpress_tensors),
    "FlashMap": (FLASHMAP, flashmap_tensors),
}
