"""EAGLE-3 in every published format drafts what the code that defines it drafts, served by our arm."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import published
import pytest
import torch
from formulas import chain, parallel
from served_chains import STEPS, serve
from torch import Tensor
from upstream_drafts import load, one_rank

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.table import read_draft

DRAFTED = 100
LLAMA = {"model_type": "llama", "rope_theta": 10000.0, "num_hidden_layers": 1, "mlp_bias": False} | published.DIMENSIONS
SGLANG = LLAMA | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFTED}
SPECULATOR = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": DRAFTED,
    "eagle_aux_hidden_state_layer_ids": [2, 5, 8],
    "norm_before_residual": False,
    "transformer_layer_config": LLAMA,
}


def tensors(features: int, layer: str, *, head_norms: bool = False, **extra: tuple[int, ...]) -> dict[str, Tensor]:
    """One EAGLE-3 layer named `layer`, and a head over `DRAFTED` ids; `extra` with dots as double underscores."""
    shapes: published.Shapes = {
        "fc.weight": (published.HIDDEN, features * published.HIDDEN),
        "norm.weight": (published.HIDDEN,),
        "lm_head.weight": (DRAFTED, published.HIDDEN),
        **published.decoder_layer(layer, head_norms=head_norms, width=2 * published.HIDDEN),
        f"{layer}hidden_norm.weight": (published.HIDDEN,),
        **{name.replace("__", "."): shape for name, shape in extra.items()},
    }
    ids = torch.randperm(published.VOCAB, generator=torch.Generator().manual_seed(8))[:DRAFTED].sort().values
    known = torch.zeros(published.VOCAB, dtype=torch.bool)
    known[ids] = True
    return published.draw(shapes) | {"d2t": ids - torch.arange(DRAFTED), "t2d": known}


def upper(*layers: int) -> published.Shapes:
    """Layers on top of the first: they read states alone, by a norm of their own; `input_layernorm` is nobody's."""
    found: published.Shapes = {}
    for index in layers:
        found |= published.decoder_layer(f"layers.{index}.", head_norms=False)
        found[f"layers.{index}.hidden_norm.weight"] = (published.HIDDEN,)
    return {name.replace(".", "__"): shape for name, shape in found.items()}


NORM, FEATURES = (published.HIDDEN,), (3 * published.HIDDEN,)
AUX = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 4, 7]}}
THREE = {f"fc_norm__{i}__weight": NORM for i in range(3)}
SGLANG_CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "default layers": ({}, tensors(3, "midlayer.")),
    "named layers, layers.0": (AUX, tensors(3, "layers.0.")),
    "two features": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 6]}}, tensors(2, "midlayer.")),
    "fc_norm": (AUX | {"fc_norm": True}, tensors(3, "midlayer.", **THREE)),
    "aux norms of before": (
        AUX | {"use_aux_norm": True},
        tensors(3, "midlayer.", aux_norm_low__weight=NORM, aux_norm_mid__weight=NORM, aux_norm_high__weight=NORM),
    ),
    "norm_before_fc": (
        {"eagle_config": AUX["eagle_config"] | {"norm_before_fc": True}},
        tensors(3, "midlayer.", input_norm__weight=FEATURES),
    ),
    "EAGLE 3.1": (AUX | {"fc_norm": True, "norm_output": True}, tensors(3, "midlayer.", **THREE)),
    "fc with a bias": ({"bias": True}, tensors(3, "midlayer.", fc__bias=NORM)),
    "rope scaled": (
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        },
        tensors(3, "midlayer."),
    ),
    "two layers": (AUX | {"num_hidden_layers": 2}, tensors(3, "layers.0.", **upper(1))),
    "three layers, midlayer the first of them": (
        AUX | {"num_hidden_layers": 3, "norm_output": True},
        tensors(3, "midlayer.", **upper(1, 2)),
    ),
}


def upstream(path: Path, features: Tensor, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """SGLang's greedy chain, ids of the target: one pass over the context, then a row at a time."""
    from sglang.srt.models import llama_eagle3

    spec = SimpleNamespace(speculative_draft_window_size=None)
    monkeypatch.setattr(llama_eagle3, "get_spec", lambda: spec)
    monkeypatch.setattr(llama_eagle3, "LogitsProcessor", lambda config: None)
    embedding = published.target_tensors()[0]
    with one_rank(), torch.no_grad():
        model = load(path, llama_eagle3.LlamaForCausalLMEagle3)
        ids, hidden, drafted, first = torch.tensor(tokens), features, [], 0
        for _ in range(STEPS):
            batch = SimpleNamespace(mm_input_embeds=None, spec_info=SimpleNamespace(hidden_states=hidden))
            positions = torch.arange(first, first + len(ids))
            final, aux = model.model(ids, positions, batch, input_embeds=embedding[ids])
            for layer in model.model.layers:
                layer.self_attn.attn.keep()
            choice = int((final[-1] @ model.lm_head.weight.T).argmax())
            drafted.append(int(model.hot_token_id[choice]))
            first, ids, hidden = first + len(ids), torch.tensor([drafted[-1]]), aux[0][-1:]
    return drafted


@pytest.mark.parametrize("case", SGLANG_CASES)
def test_sglangs_format_drafts_what_sglang_drafts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, weights = SGLANG_CASES[case]
    path = published.write(tmp_path / "draft", SGLANG | changes, weights)
    for drafted, features, tokens in zip(*serve(path), strict=True):
        assert drafted == upstream(path, features, tokens, monkeypatch)


def test_an_original_file_is_named_like_a_llama(tmp_path: Path) -> None:
    """yuhuili/EAGLE3-*: `pytorch_model.bin`, architectures LlamaForCausalLM, and a draft vocabulary."""
    weights = tensors(3, "midlayer.")
    original = published.write(
        tmp_path / "original", SGLANG | {"architectures": ["LlamaForCausalLM"]}, weights, files="bin"
    )
    assert serve(original)[0] == serve(published.write(tmp_path / "edited", SGLANG, weights))[0]
    whole = {key: value for key, value in SGLANG.items() if key != "draft_vocab_size"}
    target = published.write(tmp_path / "target", whole | {"architectures": ["LlamaForCausalLM"]}, weights)
    with pytest.raises(CheckpointError, match="without draft_vocab_size is a target, not an EAGLE-3 drafter"):
        read_draft(target)


SPECULATOR_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "llama": ({}, {}, {}),
    "norm before the residual": ({"norm_before_residual": True}, {"before_residual": True}, {}),
    "gpt-oss: norm before fc": ({"norm_before_fc": True}, {"before_fc": True}, {"input_norm__weight": FEATURES}),
    "EAGLE 3.1": ({"fc_norm": True, "norm_output": True}, {"each_before_fc": True, "feed_normed": True}, THREE),
    "trained embedding": ({"embed_requires_grad": True}, {}, {}),
    "qwen3": ({"transformer_layer_config": published.QWEN3 | {"num_hidden_layers": 1}}, {}, {}),
    "two layers": ({"transformer_layer_config": LLAMA | {"num_hidden_layers": 2}}, {}, upper(1)),
}


@pytest.mark.parametrize("case", SPECULATOR_CASES)
def test_a_speculator_drafts_by_its_formula(case: str, tmp_path: Path) -> None:
    changes, said, extra = SPECULATOR_CASES[case]
    weights = tensors(3, "layers.0.", head_norms=case == "qwen3", **extra)
    embedding = published.target_tensors(seed=5 if case == "trained embedding" else 99)[0]
    path = published.write(tmp_path / "draft", SPECULATOR | changes, weights | {"embed_tokens.weight": embedding})
    assert read_draft(path).config.layers_of(published.TARGET_LAYERS) == (1, 4, 7), "ids name what a layer reads"
    for drafted, features, tokens in zip(*serve(path), strict=True):
        own = chain(weights, embedding, features, tokens, STEPS, published.HEAD_DIM, **said)
        assert drafted == [row + int(weights["d2t"][row]) for row in own]


def test_deepspecs_format_drafts_by_its_formula(tmp_path: Path) -> None:
    """deepseek-ai/eagle3_qwen3_*: five features, head norms, a head over the whole vocabulary, no `d2t`."""
    config = published.QWEN3 | {
        "architectures": ["Qwen3Eagle3Model"],
        "num_hidden_layers": 1,
        "num_target_layers": published.TARGET_LAYERS,
        "target_layer_ids": [0, 2, 4, 6, 8],
        "ttt_length": 7,
        "step_loss_decay": 0.8,
        "draft_num_hidden_layers": 1,
    }
    embedding, head = published.target_tensors()
    weights = tensors(5, "layers.0.", head_norms=True)
    weights = {name: value for name, value in weights.items() if name not in ("d2t", "t2d")}
    weights |= {"lm_head.weight": head, "embed_tokens.weight": embedding}
    path = published.write(tmp_path / "draft", config, weights)
    for drafted, features, tokens in zip(*serve(path), strict=True):
        assert drafted == chain(weights, embedding, features, tokens, STEPS, published.HEAD_DIM)


PARALLEL = SGLANG | {"num_hidden_layers": 2, "norm_before_residual": True, "ptd_token_id": published.MASK}
PARALLEL_SPECULATOR = SPECULATOR | {"speculators_model_type": "peagle", "mask_token_id": published.MASK}
TWO = {"norm_before_residual": True, "transformer_layer_config": LLAMA | {"num_hidden_layers": 2}}


def parallel_tensors() -> dict[str, Tensor]:
    """vLLM's `llama_eagle3.py`: two layers, an embedding of its own, a feature of rows without one."""
    return tensors(3, "layers.0.", **upper(1), mask_hidden=(1, 1, 3 * published.HIDDEN)) | {
        "embed_tokens.weight": published.target_tensors(seed=5)[0]
    }


@pytest.mark.parametrize("config", [PARALLEL, PARALLEL_SPECULATOR | TWO], ids=["vLLM", "speculators"])
def test_p_eagle_drafts_by_its_formula(config: dict[str, Any], tmp_path: Path) -> None:
    weights = parallel_tensors()
    for drafted, features, tokens in zip(*serve(published.write(tmp_path / "draft", config, weights)), strict=True):
        own = parallel(weights, features, tokens, STEPS, published.HEAD_DIM, published.MASK)
        assert drafted == (own + weights["d2t"][own]).tolist()


def test_p_eagle_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ptd_token_id 320 is not in the vocabulary of 320"):
        read_draft(published.write(tmp_path / "token", PARALLEL | {"ptd_token_id": published.VOCAB}, {}))
    short = parallel_tensors() | {"mask_hidden": torch.zeros(published.HIDDEN)}
    with pytest.raises(CheckpointError, match="mask_hidden has 64 numbers, fc reads 192"):
        serve(published.write(tmp_path / "short", PARALLEL, short))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [0, 4, 7]}, "asks for the embedding"),
        ({"norm_before_residual": None}, "norm_before_residual must be true or false, got None"),
        ({"transformer_layer_config": LLAMA | {"model_type": "gemma3"}}, "must be a qwen3 or llama decoder"),
        ({"draft_vocab_size": None}, "draft_vocab_size must be an integer"),
        ({"speculators_model_type": "peagle"}, "mask_token_id must be an integer"),
    ],
)
def test_a_speculator_that_cannot_be_served(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    published.refused(tmp_path / "draft", SPECULATOR | changes, f".*{message}")
