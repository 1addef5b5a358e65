"""Domino, DFlash2, xPress and FlashMap draft what SGLang's code or a formula drafts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chosen_formats import (
    BLOCK,
    DFLASH2,
    DOMINO,
    DRAFTED,
    FLASHMAP,
    LAYERS,
    OF_DFLASH2,
    OF_DOMINO,
    RANK,
    SPECULATOR,
    XPRESS,
    dflash2_tensors,
    domino_tensors,
    flashmap_tensors,
    of_speculators,
    reduced,
    xpress_tensors,
)
from formulas import block, jump, refined
from published import HEAD_DIM, MASK, VOCAB, refused, target_tensors, write
from served_blocks import BONUS, LENGTHS, serve
from served_blocks import load as load_ours
from torch import Tensor, nn
from upstream_drafts import UpstreamBlocks, blocks, load, one_rank, upstream_states

from whiflash_sglang.arms.block import DFlashArm
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.dflash.flashmap import DRAWS


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
def test_dflash2_drafts_what_sglang_drafts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.models import dflash

    monkeypatch.setattr(dflash, "_flashinfer_top_k", None)  # a kernel for CUDA; torch's instead
    said = OF_DFLASH2 | CASES[case]
    path = write(tmp_path / "draft", DFLASH2 | {"dflash_config": said}, dflash2_tensors(said["conv_kernel_size"]))
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
    scaled = states @ head.T * said["output_multiplier"]
    cap = said["final_logit_softcapping"]
    shares = (cap * torch.tanh(scaled / cap) if cap else scaled).softmax(-1)
    candidates = shares.gather(-1, ids).sum(-1)
    for row, path_of_row in enumerate(drafted):
        place = 0
        for step, token in enumerate(path_of_row):
            behind = scores[row, step, place].float().softmax(-1)
            place = int((ids[row, step] == token).nonzero()[0, 0])
            torch.testing.assert_close(
                served.confidences[row, step], behind[place] * candidates[row, step], rtol=1e-3, atol=1e-4
            )
    assert served.tokens.tolist() != (states @ head.T).argmax(-1).tolist(), "the selector chose otherwise"


SPECULATED = SPECULATOR | {"speculators_model_type": "xpress", "block_size": BLOCK}
SPECULATED |= {"xpress_rank": RANK, "num_jacobi_passes": 3}


@pytest.mark.parametrize(
    ("config", "first"),
    [(XPRESS, 1), (XPRESS | {"sample_from_anchor": True}, 0), (SPECULATED, 1)],
    ids=["published", "from the anchor", "speculators, reduced vocabulary"],
)
def test_xpress_drafts_by_its_formula(config: dict[str, Any], first: int, tmp_path: Path) -> None:
    """The formula is shown equal to `XPressRefinerHead` of speculators 0.9.0, and so is the drafter in bfloat16."""
    weights, (embedding, head), ids = xpress_tensors(), target_tensors(), torch.arange(VOCAB)
    files = weights
    if config is SPECULATED:
        weights = reduced(weights | {"xpress_head.w2.weight": weights["xpress_head.w2.weight"][:DRAFTED]})
        files = of_speculators(weights)
        head, ids = weights["lm_head.weight"], weights["d2t"] + torch.arange(DRAFTED)
    served = serve(write(tmp_path / "draft", config, files))
    for row, tokens in enumerate(blocks(LENGTHS, BONUS, MASK, BLOCK)):
        states = block(weights, embedding[tokens], served.features[row], HEAD_DIM, [None] * LAYERS)
        passes = [refined(weights, states, head, ids, BONUS[row], count, first) for count in range(4)]
        assert served.tokens[row].tolist() == ids[passes[-1].argmax(-1)].tolist()
        sure = passes[-1].softmax(-1).amax(-1)
        torch.testing.assert_close(served.confidences[row], sure, rtol=1e-3, atol=1e-5)
        drafts = {tuple(logits.argmax(-1).tolist()) for logits in passes}
        assert len(drafts) == len(passes), "every pass changes drafts"


@pytest.mark.parametrize("drafted", [DRAFTED, 0], ids=["reduced vocabulary", "whole vocabulary"])
def test_flashmap_drafts_by_its_formula(drafted: int, tmp_path: Path) -> None:
    """The formula is shown equal to `FlashMapDraftModel` of flashmap 0.1.0, given the noise."""
    weights, (embedding, head) = flashmap_tensors(), target_tensors()
    served = serve(write(tmp_path / "draft", FLASHMAP | {"draft_vocab_size": drafted}, weights))
    ids = weights["ids"][: drafted or VOCAB].sort().values
    drawn = torch.randn(DRAWS * BLOCK, VOCAB, generator=torch.Generator().manual_seed(0))
    for row, (length, bonus) in enumerate(zip(LENGTHS, BONUS, strict=True)):
        found = []
        for noise in (drawn.view(DRAWS, BLOCK, -1)[(length + later) % DRAWS] for later in (0, 1)):
            states = jump(weights, embedding, served.features[row], bonus, noise, HEAD_DIM)
            found.append((states @ head.T)[:, ids])
        assert served.tokens[row].tolist() == ids[found[0].argmax(-1)].tolist()
        sure = found[0].softmax(-1).amax(-1)
        torch.testing.assert_close(served.confidences[row], sure, rtol=1e-3, atol=1e-5)
        assert found[0].argmax(-1).tolist() != found[1].argmax(-1).tolist(), "the position picks the noise"


def test_flashmap_follows_a_target_that_is_written(tmp_path: Path) -> None:
    path, other = write(tmp_path / "draft", FLASHMAP, flashmap_tensors()), target_tensors(5)
    draft, model = load_ours(path)
    layers, vocabulary = draft.config.target_layer_ids, model.head.ids[::2]
    arm = DFlashArm(model, layers, layers, BLOCK + 1, 256, vocabulary)
    model.target_embedding.copy_(other[0])
    model.target_lm_head.copy_(other[1])
    arm.target_written()
    target = {"target_embedding": other[0], "target_lm_head": other[1]}
    loaded = draft.load(device=torch.device("cpu"), dtype=torch.float32, **target)
    state = torch.ones(1, draft.config.hidden_size)
    assert torch.equal(model.starts, loaded.starts)
    assert torch.equal(arm._head.logits(state), loaded.head.within(vocabulary).logits(state))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DOMINO | {"dflash_config": OF_DOMINO | {"shift_label": None}}, "shift_label must be true or false"),
        (DOMINO | {"dflash_config": OF_DOMINO | {"pure_draft_prefix_len": 2}}, "pure_draft_prefix_len must be 1"),
        (DOMINO | {"dflash_config": 5}, "dflash_config must be an object, got 5"),
        (DOMINO | {"dflash_config": OF_DOMINO | {"gru_hidden_dim": 0}}, "gru_hidden_dim must be an integer"),
        (DFLASH2 | {"dflash_config": OF_DFLASH2 | {"selector_top_k": None}}, "selector_top_k must be an integer"),
        (DFLASH2 | {"dflash_config": OF_DFLASH2 | {"conv_group_size": 7}}, "divides hidden_size 64"),
        (DFLASH2 | {"dflash_config": OF_DFLASH2 | {"conv_group_size": 0}}, "go together"),
        (
            DFLASH2 | {"dflash_config": OF_DFLASH2 | {"output_multiplier": -1.0}},
            "output_multiplier must be a number above 0",
        ),
        (XPRESS | {"xpress_num_passes": 0}, "xpress_num_passes must be an integer of at least 1"),
        (XPRESS | {"xpress_candidate_topc": 256}, "xpress_candidate_topc 256 belongs to a drafter"),
        (FLASHMAP | {"num_steps": 2}, "num_steps 2 is not supported, only 1"),
        (FLASHMAP | {"flow_map": False}, "flow_map False is not supported, only True"),
        (FLASHMAP | {"target_hidden_size": None}, "target_hidden_size must be an integer"),
    ],
)
def test_a_configuration_that_does_not_fit(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(tmp_path / "draft", config, f".*{message}")


@pytest.mark.parametrize(
    ("config", "tensors", "name"),
    [
        (DOMINO, domino_tensors(), "prefix_gru.weight_hh_l0"),
        (DFLASH2, dflash2_tensors(3), "candidate_selector.successor_codebook"),
        (DFLASH2, dflash2_tensors(3), "layers.1.mlp_conv.base_kernel"),
        (XPRESS, xpress_tensors(), "xpress_head.mix.L"),
        (FLASHMAP, flashmap_tensors(), "layers.1.cross_attn_adaln.linear.bias"),
        (FLASHMAP, flashmap_tensors(), "layers.1.cross_attn.q_proj.weight"),
        (FLASHMAP, flashmap_tensors(), "ids"),
    ],
)
def test_a_tensor_that_is_missing_is_named(
    config: dict[str, Any], tensors: dict[str, Tensor], name: str, tmp_path: Path
) -> None:
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=f"the weights lack {name}"):
        serve(write(tmp_path / "draft", config, rest))
