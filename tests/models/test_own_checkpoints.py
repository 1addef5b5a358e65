"""Files of DFlash and EAGLE-3, KV-only passes, errors (drafts: `test_dflash_variants`, `test_eagle3_formats`)."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from formulas import attend
from safetensors.torch import load_file, save_file
from tiny_models import edit, tiny_dflash, tiny_eagle3, tiny_target
from torch import Tensor
from whiflash_kernels.float8 import quantise_rows
from whiflash_kernels.packed import _FLOAT8, quantise

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.packed import quantise_modules

LENGTH = 9


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"))


def checkpoint(kind: type, path: Path, target: Path) -> Path:
    tiny = tiny_dflash if kind is DFlashDrafter else partial(tiny_eagle3, draft_vocab_size=100)
    return tiny(path / "draft", target)


def load(kind: Any, path: Path, target: Path) -> Any:
    weights = load_file(target / "model.safetensors")
    return kind.load(
        path,
        device=torch.device("cpu"),
        dtype=torch.float32,
        target_embedding=weights["model.embed_tokens.weight"].float(),
        target_lm_head=weights["lm_head.weight"].float(),
    )


@pytest.mark.parametrize("kind", [DFlashDrafter, Eagle3Drafter])
def test_saving_reproduces_the_file(kind: type, target: Path, tmp_path: Path) -> None:
    path = checkpoint(kind, tmp_path, target)
    load(kind, path, target).save(tmp_path / "again", torch.float32)
    before, after = (load_file(place / "model.safetensors") for place in (path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = (load(kind, place, target).config for place in (path, tmp_path / "again"))
    assert first == second


def test_training_mode_sees_changed_weights(target: Path, tmp_path: Path) -> None:
    drafter = load(DFlashDrafter, checkpoint(DFlashDrafter, tmp_path, target), target)
    fused, places = torch.randn(3, 64), torch.arange(3)
    with torch.no_grad():
        before = drafter.keys_values(fused, places)[1].clone()
        drafter.train()
        drafter.layers[0].attention.qkv.weight.mul_(2)
        during = drafter.keys_values(fused, places)[1]
        drafter.eval()
        after = drafter.keys_values(fused, places)[1]
    torch.testing.assert_close(during[0], 2 * before[0])
    torch.testing.assert_close(after, during)


def test_kv_only_pass_stores_what_the_full_pass_stores(target: Path, tmp_path: Path) -> None:
    drafter = load(Eagle3Drafter, checkpoint(Eagle3Drafter, tmp_path, target), target)
    tokens, features = torch.randint(0, 300, (LENGTH,)), torch.randn(LENGTH, 3 * 64)
    positions = torch.arange(40, 40 + LENGTH)
    stored: list[Tensor] = []

    def unchanged(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stored.extend([k, v])
        return q

    with torch.no_grad():
        drafter(tokens, drafter.fuse(features), positions, unchanged)
        keys, values = drafter.keys_values(tokens, drafter.fuse(features), positions)
    torch.testing.assert_close(keys, stored[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(values, stored[1], rtol=0, atol=1e-6)


OF_DFLASH: list[tuple[dict[str, object], str]] = [
    ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": []}}, "must be a list of layer numbers"),
    ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1]}}, "does not fit"),
    ({"hidden_size": 32}, "hidden size 32, the embedding handed in has 64"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window must be an integer"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "names 'linear_attention'"),
    ({"layer_types": ["full_attention"]}, "layer_types must name 2 layers"),
    (
        {"layer_types": ["sliding_attention"] * 2, "is_causal": False, "sliding_window": 9},
        "is_causal false with sliding_attention",
    ),
    ({"attention_bias": True}, r"lack layers\.0\.self_attn\.q_proj\.bias"),
    ({"attention_sink_bias": True}, "attention_sink_bias True belongs to a drafter that is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer of at most 1000"),
    ({"partial_rotary_factor": 0.01}, "of a head's 16 dimensions cannot be rotated"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "architectures is"),
]
OF_EAGLE3: list[tuple[dict[str, object], str]] = [
    ({"intermediate_size": 64}, r"mlp.gate_proj.weight \[128, 64\]"),
    ({"architectures": ["LlamaForCausalLM"]}, "architectures is"),
    ({"num_key_value_heads": 3}, "does not divide"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq.* is not read"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral' is unknown"),
]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [(DFlashDrafter, *case) for case in OF_DFLASH] + [(Eagle3Drafter, *case) for case in OF_EAGLE3],
)
def test_config_that_does_not_fit(
    kind: type, target: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = checkpoint(kind, tmp_path, target)
    edit(path, lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=message):
        load(kind, path, target)


def test_the_last_of_two_layers_is_ingested_behind_the_attention_of_the_first(tmp_path: Path, target: Path) -> None:
    drafter = load(Eagle3Drafter, tiny_eagle3(tmp_path / "two", target, num_layers=2), target)
    torch.manual_seed(1)
    tokens, features = torch.randint(0, 300, (LENGTH,)), torch.randn(LENGTH, 3 * 64)
    positions, stored = torch.arange(LENGTH), {}

    def storing(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stored[layer] = k, v
        return attend(q, k, v, [slice(0, row + 1) for row in range(LENGTH)])

    with torch.no_grad():
        fused = drafter.fuse(features)
        drafter(tokens, fused, positions, storing)
        whole = dict(stored)
        stored.clear()
        last = drafter.keys_values(tokens, fused, positions, storing)
        assert set(stored) == {0}, "the last layer attends to nothing while it ingests"
        torch.testing.assert_close((stored[0], last), (whole[0], whole[1]), rtol=0, atol=1e-6)
        with pytest.raises(CheckpointError, match="2 layers need attention over the text"):
            drafter.keys_values(tokens, fused, positions)


def rounded(x: Tensor) -> Tensor:
    values, scale = quantise_rows(x.reshape(-1, x.shape[-1]))
    return (values.float() * scale[:, None]).view(x.shape)


@torch.no_grad()
def drafted(drafter: Any) -> tuple[Tensor, Tensor]:
    """The choice of each of 40 rows, and K and V of their features."""
    tokens, places = torch.arange(60, 100), torch.arange(40)
    fused = drafter.fuse(torch.randn(40, 3 * 64, generator=torch.Generator().manual_seed(4)))
    block = (tokens.view(5, 8), places.view(5, 8)), (fused, places)
    one, context = block if isinstance(drafter, DFlashDrafter) else [(tokens, fused, places)] * 2
    states = drafter(*one, lambda layer, q, k, v: q + v.repeat(1, 2, 1))
    chosen = drafter.choose((states[1] if len(states) == 2 else states).reshape(40, -1))
    return chosen.token, torch.stack(drafter.keys_values(*context))


@pytest.mark.parametrize("kind", [DFlashDrafter, Eagle3Drafter])
def test_fp8_drafts_what_rounded_factors_draft(kind: type, target: Path, tmp_path: Path) -> None:
    tiny = tiny_dflash if kind is DFlashDrafter else partial(tiny_eagle3, draft_vocab_size=96)
    drafter = load(kind, tiny(tmp_path / "draft", target), target).requires_grad_(False)
    plain, linear, own = drafted(drafter), F.linear, drafter.target_lm_head
    with patch.object(F, "linear", lambda x, w, *bias: linear(rounded(x), rounded(w), *bias)):
        expected = drafted(drafter)
    quantise_modules(drafter)
    quantise([drafter.head.weight])
    found = drafted(drafter)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], plain[1], rtol=1e-3)
    assert not hasattr(own, _FLOAT8), "the target's own products stay"


def test_a_checkpoint_in_fp8_is_multiplied_by_its_scales(target: Path, tmp_path: Path) -> None:
    path = checkpoint(Eagle3Drafter, tmp_path, target)
    tensors = load_file(path / "model.safetensors")
    for scale in (torch.tensor(0.7), torch.rand(64, 1)):
        values = tensors["fc.weight"].to(torch.float8_e4m3fn)
        save_file(tensors | {"fc.weight": values, "fc.weight_scale": scale}, path / "model.safetensors")
        assert torch.equal(load(Eagle3Drafter, path, target).fc.weight, values.float() * scale)
    for wrong in (values, values.to(torch.int8)):
        save_file(tensors | {"fc.weight": wrong}, path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"fc.weight is {wrong.dtype}, .*; give 16 bits, or a float8"):
            load(Eagle3Drafter, path, target)
