"""Tiny random checkpoints of Domino, DFlash2 and LiLiCorr, under the names and keys of their files."""

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

WIDTH, HEADS, EXPANDED, FACTOR = 32, 4, 48, 6
OF_LILICORR = TRUNK | {
    "conv_kernel_size": 2,
    "conv_group_size": 32,
    "lilicorr_candidate_topk": 4,
    "lilicorr_hidden_size": WIDTH,
    "lilicorr_num_layers": 2,
    "lilicorr_num_heads": HEADS,
    "lilicorr_mlp_ratio": 1.5,
    "lilicorr_factor_dim": FACTOR,
    "lilicorr_vector_eps": 1e-6,
    "lilicorr_logit_scale": 7.0,
}
LILICORR = BASE | {"architectures": ["LiLiCorrDraftModel"], "dflash_config": OF_LILICORR}


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


def lilicorr_tensors(width: int) -> dict[str, Tensor]:
    inner, top = int(1.5 * width), OF_LILICORR["lilicorr_candidate_topk"]
    linear = {
        "pass_hidden_proj": (width, HIDDEN),
        "context_proj": (width, HIDDEN),
        "feature_mlp.up_proj": (width, 5),
        "feature_mlp.down_proj": (width, width),
        "factor_input_proj": (width, 3 * width),
        "out_head": (FACTOR, width),
        "in_head": (FACTOR, width),
        "anchor_out_head": (FACTOR, width),
    }
    if width != HIDDEN:
        linear["token_proj"] = (width, HIDDEN)
    shapes: Shapes = {
        "slot_embedding": (1, 1, BLOCK - 1, 1, width),
        "rank_embedding": (1, 1, 1, top, width),
        "relative_slot_bias": (HEADS, 2 * BLOCK - 1),
        "same_slot_bias": (HEADS,),
        "feature_norm.weight": (5,),
        "feature_norm.bias": (5,),
        "output_norm.weight": (width,),
        "anchor_norm.weight": (width,),
    }
    for index in range(2):
        layer = f"layers.{index}."
        shapes |= {f"{layer}attn_norm.weight": (width,), f"{layer}mlp_norm.weight": (width,)}
        shapes |= {
            f"{layer}attn.in_proj_weight": (3 * width, width),
            f"{layer}attn.in_proj_bias": (3 * width,),
        }
        linear |= {f"{layer}attn.out_proj": (width, width)}
        linear |= {f"{layer}mlp.up_proj": (inner, width), f"{layer}mlp.down_proj": (width, inner)}
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    head = {f"lilicorr.{name}": shape for name, shape in shapes.items()}
    return draw(block_trunk(LAYERS, 3) | convolutions(LAYERS, 2, 32) | head)
