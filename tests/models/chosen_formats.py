"""Tiny random checkpoints of Domino, DFlash2, xPress and speculators, under the names and keys of their files."""

import torch
from published import HIDDEN, MASK, QWEN3, TARGET_LAYERS, VOCAB, Shapes, block_trunk, convolutions, draw
from torch import Tensor

LAYERS, BLOCK, STATE, RANK, TOP = 2, 8, 24, 12, 5
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


def of_speculators(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As speculators names the tensors of xPress."""
    names = {f"xpress_head.{name}": f"refiner_head.{theirs}" for name, (theirs, _) in REFINER.items()}
    return {names.get(name, name): tensor for name, tensor in weights.items()}


def reduced(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a head of its own over `DRAFTED` ids."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(8))[:DRAFTED].sort().values
    own = torch.randn(DRAFTED, HIDDEN, generator=torch.Generator().manual_seed(9))
    return weights | {"lm_head.weight": own, "d2t": ids - torch.arange(DRAFTED)}
