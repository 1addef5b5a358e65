"""Tiny random checkpoints of Domino and DFlash2, under the names and keys of their files."""

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
