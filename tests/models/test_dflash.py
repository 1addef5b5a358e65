"""The DFlash drafter's file format and its errors; what it drafts is `test_dflash_variants`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_dflash, tiny_target

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def checkpoint(tmp_path: Path, target: Path) -> Path:
    return tiny_dflash(tmp_path / "dflash", target)


def load(path: Path, target: Path) -> DFlashDrafter:
    weights = load_file(target / "model.safetensors")
    return DFlashDrafter.load(
        path,
        device=torch.device("cpu"),
        dtype=torch.float32,
        target_embedding=weights["model.embed_tokens.weight"].float(),
        target_lm_head=weights["lm_head.weight"].float(),
    )


def test_saving_reproduces_the_file(checkpoint: Path, target: Path, tmp_path: Path) -> None:
    load(checkpoint, target).save(tmp_path / "again", torch.float32)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = (load(path, target).config for path in (checkpoint, tmp_path / "again"))
    assert first == second


def test_training_mode_sees_changed_weights(checkpoint: Path, target: Path) -> None:
    drafter = load(checkpoint, target)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
        (
            {"attention_sink_bias": True},
            "attention_sink_bias True belongs to a drafter that is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"partial_rotary_factor": 0.01}, "of a head's 16 dimensions cannot be rotated"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "architectures is"),
    ],
)
def test_config_that_does_not_fit(
    checkpoint: Path, target: Path, changes: dict[str, object], message: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint, target)
