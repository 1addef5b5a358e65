"""DSpark and speculators' block drafters draft what the code that defines them drafts, served by our arm."""

from pathlib import Path
from typing import Any

import published
import pytest
import torch
from chosen_formats import DRAFTED, SPECULATOR, reduced
from formulas import block
from served_blocks import BONUS, LENGTHS, serve
from served_blocks import load as load_ours
from torch import Tensor
from upstream_drafts import UpstreamBlocks, blocks, load, one_rank, upstream_states

from whiflash_sglang.checkpoints.fit import block_size_of
from whiflash_sglang.formats.checkpoint import read_weights
from whiflash_sglang.formats.table import read_draft

LAYERS, DRAFTS, RANK = 2, 7, 24
HEADS_OF = {
    "vanilla": {},
    "gated": {"gate_proj.weight": (RANK, published.HIDDEN + RANK), "gate_proj.bias": (RANK,)},
    "rnn": {"joint_proj.weight": (3 * RANK, published.HIDDEN + 2 * RANK), "joint_proj.bias": (3 * RANK,)},
}
DEEPSPEC = published.QWEN3 | {
    "architectures": ["Qwen3DSparkModel"],
    "num_hidden_layers": LAYERS,
    "layer_types": ["full_attention"] * LAYERS,
    "num_target_layers": published.TARGET_LAYERS,
    "target_layer_ids": [1, 4, 8],
    "block_size": DRAFTS,
    "mask_token_id": published.MASK,
    "num_anchors": 512,
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "markov_rank": RANK,
    "markov_head_type": "vanilla",
}
"""deepspec/modeling/dspark/qwen3/config.py: everything at the top level."""
NESTED = ("mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")
NESTED += ("enable_confidence_head", "confidence_head_with_markov")
SPECFORGE = {key: value for key, value in DEEPSPEC.items() if key not in NESTED} | {
    "architectures": ["DSparkDraftModel"],
    "dflash_config": {key: DEEPSPEC[key] for key in NESTED} | {"projector_type": "dspark", "attention_mode": "gqa"},
}
"""SpecForge's configs/qwen3-8b-dspark.json: most of it in `dflash_config`."""


def tensors(
    kind: str = "vanilla", *, rank: int = RANK, confidence: bool = True, drafted: int = published.VOCAB
) -> dict[str, Tensor]:
    """With the target's embedding and head, which DeepSpec's files repeat."""
    shapes: published.Shapes = published.block_trunk(LAYERS, 3)
    if rank:
        shapes |= {
            "markov_head.markov_w1.weight": (published.VOCAB, rank),
            "markov_head.markov_w2.weight": (drafted, rank),
        }
        shapes |= {f"markov_head.{name}": shape for name, shape in HEADS_OF[kind].items()}
    if confidence:
        shapes |= {"confidence_head.proj.weight": (1, published.HIDDEN + rank), "confidence_head.proj.bias": (1,)}
    drawn = published.draw(shapes)
    if rank:  # so that a token's predecessor matters
        drawn["markov_head.markov_w1.weight"] *= 4
        drawn["markov_head.markov_w2.weight"] *= 4
    embedding, head = published.target_tensors()
    return drawn | {"embed_tokens.weight": embedding, "lm_head.weight": head}


CASES: dict[str, dict[str, Any]] = {
    "DeepSpec": DEEPSPEC,
    "SpecForge": SPECFORGE,
    "Ling": DEEPSPEC | {"architectures": ["LingDSparkModel"]},
    "gated": DEEPSPEC | {"markov_head_type": "gated"},
    "rnn": DEEPSPEC | {"markov_head_type": "rnn"},
    "no confidence head": DEEPSPEC | {"enable_confidence_head": False},
    "not from the anchor": DEEPSPEC | {"sample_from_anchor": False},
    "written by us": DEEPSPEC,
}


@pytest.mark.parametrize("case", CASES)
def test_dspark_drafts_what_sglang_drafts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.models import dspark

    # The static mode builds no confidence head.
    monkeypatch.setattr(dspark, "read_ragged_verify_mode", lambda: None)
    config = CASES[case]
    settings = config | config.get("dflash_config", {})
    confidence = settings["enable_confidence_head"]
    path = published.write(tmp_path / "draft", config, tensors(settings["markov_head_type"], confidence=confidence))
    if case == "written by us":
        load_ours(path)[1].save(tmp_path / "written", torch.float32)
        path = tmp_path / "written"
        assert set(read_weights(path)) == set(tensors()) - {"embed_tokens.weight", "lm_head.weight"}
    served = serve(path)
    assert served.tokens.shape == (len(LENGTHS), DRAFTS)
    assert block_size_of(path, None) == DRAFTS + 1
    embedding, head = published.target_tensors()
    missing = {} if confidence else {"enable_confidence_head": False}
    changed = {key: settings[key] for key in ("markov_rank", "markov_head_type", "confidence_head_with_markov")}
    with one_rank(), torch.no_grad():
        if not confidence:
            monkeypatch.setattr(dspark, "build_confidence_head", lambda config: None)
        model = load(path, getattr(dspark, config["architectures"][0]), **changed, **missing)
        for row, states in enumerate(upstream_states(served, UpstreamBlocks(model, embedding))):
            drafting = states[-DRAFTS:][None]
            drafted = markov(model.markov_head, drafting @ head.T, torch.tensor([BONUS[row]]), drafting)
            assert served.tokens[row].tolist() == drafted[0].tolist()
            if confidence:
                sure, _ = model.compute_confidence(
                    anchor_tokens=torch.tensor([BONUS[row]]), draft_tokens=drafted, confidence_features=drafting
                )
                torch.testing.assert_close(served.confidences[row], sure[0], rtol=1e-4, atol=1e-5)


def markov(head: Any, logits: Tensor, anchor: Tensor, hidden: Tensor) -> Tensor:
    """Greedy drafts [1, D] by SGLang's Markov head."""
    previous, state, drafted = anchor, head.init_state(hidden), []
    for step in range(logits.shape[1]):
        bias, state = head.step_bias(previous, hidden_states=hidden[:, step], state=state)
        previous = (logits[:, step] + bias).argmax(-1)
        drafted.append(previous)
    return torch.stack(drafted, 1)


def test_deepspecs_dflash_drafts_from_every_row(tmp_path: Path) -> None:
    """deepseek-ai/dflash_qwen3_*: rank 0, no confidence head, seven drafts of seven rows."""
    config = {key: value for key, value in DEEPSPEC.items() if "confidence_head_with" not in key}
    config |= {"markov_rank": 0, "enable_confidence_head": False}
    del config["markov_head_type"]
    weights = tensors(rank=0, confidence=False)
    served = serve(published.write(tmp_path / "draft", config, weights))
    embedding, head = published.target_tensors()
    for row, tokens in enumerate(blocks(LENGTHS, BONUS, published.MASK, DRAFTS)):
        states = block(weights, embedding[tokens], served.features[row], published.HEAD_DIM, [None] * LAYERS)
        assert served.tokens[row].tolist() == (states @ head.T).argmax(-1).tolist()


WINDOWED = SPECULATOR["transformer_layer_config"] | {
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 4,
}


@pytest.mark.parametrize(
    ("changes", "windows", "first"),
    [
        ({}, [None, None], 1),
        ({"transformer_layer_config": WINDOWED}, [4, None], 1),
        ({"sample_from_anchor": True}, [None, None], 0),
    ],
    ids=["reduced vocabulary", "sliding windows", "from the anchor"],
)
def test_a_dflash_speculator_drafts_by_its_formula(
    changes: dict[str, Any], windows: list[int | None], first: int, tmp_path: Path
) -> None:
    weights = reduced(tensors(rank=0, confidence=False))
    path = published.write(tmp_path / "draft", SPECULATOR | changes, weights)
    assert read_draft(path).config.target_layer_ids == (1, 4, 8), "ids name what a layer reads"
    served, embedding = serve(path), published.target_tensors()[0]
    for row, tokens in enumerate(blocks(LENGTHS, BONUS, published.MASK, 6)):
        states = block(weights, embedding[tokens], served.features[row], published.HEAD_DIM, windows)
        rows = (states[first:] @ weights["lm_head.weight"].T).argmax(-1)
        assert served.tokens[row].tolist() == (rows + weights["d2t"][rows]).tolist()


def test_a_dspark_speculator_drafts_by_its_formula(tmp_path: Path) -> None:
    """W1 over the verifier's vocabulary, W2 over the drafter's."""
    config = SPECULATOR | {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "sample_from_anchor": True,
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    weights = reduced(tensors(drafted=DRAFTED))
    served, embedding = serve(published.write(tmp_path / "draft", config, weights)), published.target_tensors()[0]
    w1, w2 = (weights[f"markov_head.markov_w{i}.weight"] for i in (1, 2))
    for row, tokens in enumerate(blocks(LENGTHS, BONUS, published.MASK, 6)):
        states = block(weights, embedding[tokens], served.features[row], published.HEAD_DIM, [None] * LAYERS)
        previous, drafted, sure = BONUS[row], [], []
        for state in states:
            features = torch.cat([state, w1[previous]])
            sure.append(
                torch.sigmoid(
                    weights["confidence_head.proj.weight"][0] @ features + weights["confidence_head.proj.bias"][0]
                )
            )
            choice = int((weights["lm_head.weight"] @ state + w2 @ w1[previous]).argmax())
            previous = choice + int(weights["d2t"][choice])
            drafted.append(previous)
        assert served.tokens[row].tolist() == drafted
        torch.testing.assert_close(served.confidences[row], torch.stack(sure), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DEEPSPEC | {"markov_head_type": "deep"}, "markov_head_type 'deep' is not one of vanilla, gated, rnn"),
        (DEEPSPEC | {"markov_rank": 0}, "confidence_head_with_markov needs markov_rank above 0"),
        (DEEPSPEC | {"quantization_config": {"quant_algo": "W4A16_NVFP4"}}, "quantization_config"),
        (SPECULATOR | {"sliding_window_non_causal": True, "transformer_layer_config": WINDOWED}, "look back only"),
        (SPECULATOR | {"aux_hidden_state_layer_ids": None}, "aux_hidden_state_layer_ids must be a list"),
    ],
)
def test_a_block_drafter_that_cannot_be_served(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    published.refused(tmp_path / "draft", config, f".*{message}")
