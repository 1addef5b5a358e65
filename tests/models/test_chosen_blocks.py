"""Domino, DFlash2 and LiLiCorr, whose drafts follow those before them in the block, draft what SGLang's code drafts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from published import (
    HIDDEN,
    MASK,
    QWEN3,
    TARGET_LAYERS,
    VOCAB,
    Shapes,
    block_trunk,
    convolutions,
    draw,
    target_tensors,
    write,
)
from served_blocks import BONUS, LENGTHS, Served, serve
from torch import Tensor, nn
from upstream_drafts import UpstreamBlocks, blocks, load, one_rank

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.formats import read_draft

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


def upstream_states(served: Served, upstream: UpstreamBlocks) -> list[Tensor]:
    """SGLang's states [rows, H] of every request, which are ours."""
    found = []
    for row, tokens in enumerate(blocks(LENGTHS, BONUS, MASK, served.states.shape[1])):
        context = upstream.keys_values(served.features[row], torch.arange(LENGTHS[row]))
        found.append(upstream.states(tokens, context))
        torch.testing.assert_close(served.states[row], found[-1], rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("shifted", [True, False])
def test_domino_drafts_what_sglang_drafts(shifted: bool, tmp_path: Path) -> None:
    from sglang.srt.models.dflash import DFlashDraftModel
    from sglang.srt.speculative.domino_utils import domino_greedy_rollout

    config = DOMINO | {"dflash_config": OF_DOMINO | {"shift_label": shifted}}
    path = write(tmp_path / "draft", config, domino_tensors())
    served, (embedding, head) = serve(path), target_tensors()
    assert served.tokens.shape == (len(LENGTHS), BLOCK - 1)
    assert served.states.shape[1] == BLOCK, "SGLang runs the whole block whichever row is first"
    with one_rank(), torch.no_grad():
        model = load(path, DFlashDraftModel)
        states = torch.stack(upstream_states(served, UpstreamBlocks(model, embedding)))
        drafted = domino_greedy_rollout(
            draft_hidden=states,
            bonus_tokens=torch.tensor(BONUS),
            target_embedding=nn.Embedding.from_pretrained(embedding),
            lm_head_weight=head,
            prefix_gru=model.prefix_gru,
            embed_proj=model.embed_proj,
            vocab_size=VOCAB,
            shift_label=shifted,
            candidate_pool_size=0,
            in_cuda_graph=False,
        )
    assert served.tokens.tolist() == drafted.tolist()
    first = 0 if shifted else 1
    alone = (states[:, first : first + BLOCK - 1] @ head.T).argmax(-1)
    assert served.tokens[:, 0].tolist() == alone[:, 0].tolist(), "the first is not corrected"
    assert served.tokens.tolist() != alone.tolist(), "and others are"


CASES: dict[str, dict[str, Any]] = {
    "with convolutions, capped": {},
    "without convolutions": {"conv_kernel_size": 0, "conv_group_size": 0},
    "not capped": {"final_logit_softcapping": 0.0, "output_multiplier": 1.0},
    "more candidates than tokens": {"selector_top_k": 2 * VOCAB},
}


@pytest.mark.parametrize("case", CASES)
def test_dflash2_drafts_what_sglang_drafts(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.models import dflash

    monkeypatch.setattr(dflash, "_flashinfer_top_k", None)  # a kernel for CUDA; torch's instead
    said = OF_DFLASH2 | CASES[case]
    path = write(
        tmp_path / "draft", DFLASH2 | {"dflash_config": said}, dflash2_tensors(said["conv_kernel_size"])
    )
    served, (embedding, head) = serve(path), target_tensors()
    top = min(said["selector_top_k"], VOCAB)
    with one_rank(), torch.no_grad():
        model = load(path, dflash.DFlash2DraftModel)
        states = torch.stack(upstream_states(served, UpstreamBlocks(model, embedding)))[:, 1:]
        model.candidate_selector.top_k = top
        model.lm_head = SimpleNamespace(weight=head, org_vocab_size=VOCAB, quant_method=None)
        ids, unary = model.compute_candidates(states.flatten(0, 1))
        ids = ids.view(len(LENGTHS), BLOCK - 1, top)
        scores = model.candidate_selector.build_lattice(
            candidate_ids=ids,
            unary_logits=unary.view(ids.shape),
            hidden_states=states,
            anchor_token_ids=torch.tensor(BONUS),
        )
        drafted, _ = model.candidate_selector.sample_path(
            candidate_ids=ids,
            scores=scores,
            uniforms=torch.zeros(ids.shape[:2]),
            temperatures=torch.ones(len(LENGTHS)),
            greedy_mask=torch.ones(len(LENGTHS), dtype=torch.bool),
        )
    assert served.tokens.tolist() == drafted.tolist()
    for row, path_of_row in enumerate(drafted):
        place = 0
        for step, token in enumerate(path_of_row):
            behind = scores[row, step, place].float().softmax(-1)
            place = int((ids[row, step] == token).nonzero()[0, 0])
            torch.testing.assert_close(served.confidences[row, step], behind[place], rtol=1e-3, atol=1e-4)
    alone = (states @ head.T).argmax(-1)
    assert served.tokens.tolist() != alone.tolist(), "the selector chose otherwise"


@pytest.mark.parametrize("width", [WIDTH, HIDDEN])
def test_lilicorr_drafts_what_sglang_drafts(width: int, tmp_path: Path) -> None:
    """With a head narrower than the trunk, and with one as wide, which embeds tokens as the trunk does."""
    from sglang.srt.models.lilicorr import LiLiCorrDraftModel
    from sglang.srt.speculative.lilicorr_utils import propose_lilicorr_block

    said = OF_LILICORR | {"lilicorr_hidden_size": width if width != HIDDEN else 0}
    path = write(tmp_path / "draft", LILICORR | {"dflash_config": said}, lilicorr_tensors(width))
    served, (embedding, head) = serve(path), target_tensors()
    with one_rank(), torch.no_grad():
        model = load(path, LiLiCorrDraftModel)
        model.lilicorr.materialize_inference_buffers(torch.device("cpu"), torch.float32)
        states = torch.stack(upstream_states(served, UpstreamBlocks(model, embedding)))
        last = torch.stack([features[-1] for features in served.features])
        drafted, _, _ = propose_lilicorr_block(
            head=model.lilicorr,
            draft_hidden=states,
            lm_head=SimpleNamespace(weight=head, org_vocab_size=VOCAB, quant_method=None),
            embed_tokens=nn.Embedding.from_pretrained(embedding),
            anchor=model.project_target_hidden(last),
        )
    assert served.tokens.tolist() == drafted.tolist()
    alone = (states[:, 1:] @ head.T).argmax(-1)
    assert served.tokens.tolist() != alone.tolist(), "the head chose otherwise"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DOMINO | {"dflash_config": OF_DOMINO | {"shift_label": None}}, "shift_label must be true or false"),
        (
            DOMINO | {"dflash_config": OF_DOMINO | {"pure_draft_prefix_len": 2}},
            "pure_draft_prefix_len must be 1",
        ),
        (DOMINO | {"dflash_config": OF_DOMINO | {"gru_hidden_dim": 0}}, "gru_hidden_dim must be an integer"),
        (
            DFLASH2 | {"dflash_config": OF_DFLASH2 | {"selector_top_k": None}},
            "selector_top_k must be an integer",
        ),
        (DFLASH2 | {"dflash_config": OF_DFLASH2 | {"conv_group_size": 7}}, "divides hidden_size 64"),
        (DFLASH2 | {"dflash_config": OF_DFLASH2 | {"conv_group_size": 0}}, "go together"),
        (
            DFLASH2 | {"dflash_config": OF_DFLASH2 | {"output_multiplier": -1.0}},
            "output_multiplier must be above 0",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "draft", config, {})
    with pytest.raises(CheckpointError, match=rf"{path}/config\.json: .*{message}"):
        read_draft(path)


@pytest.mark.parametrize(
    ("config", "tensors", "name"),
    [
        (DOMINO, domino_tensors(), "prefix_gru.weight_hh_l0"),
        (DFLASH2, dflash2_tensors(3), "candidate_selector.successor_codebook"),
        (DFLASH2, dflash2_tensors(3), "layers.1.mlp_conv.base_kernel"),
        (LILICORR, lilicorr_tensors(WIDTH), "lilicorr.same_slot_bias"),
    ],
)
def test_a_tensor_that_is_missing_is_named(
    config: dict[str, Any], tensors: dict[str, Tensor], name: str, tmp_path: Path
) -> None:
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=f"the weights lack {name}"):
        serve(write(tmp_path / "draft", config, rest))
