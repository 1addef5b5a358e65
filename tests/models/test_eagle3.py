"""The EAGLE-3 drafter's file format, its passes without outputs and its errors (drafts: `test_eagle3_formats`)."""

import json
from pathlib import Path

import pytest
import torch
from formulas import attend
from safetensors.torch import load_file
from tiny_models import tiny_eagle3, tiny_target
from torch import Tensor

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.eagle3 import Eagle3Drafter

LENGTH = 9


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def checkpoint(tmp_path: Path, target: Path) -> Path:
    return tiny_eagle3(tmp_path / "eagle3", target, draft_vocab_size=100)


def load(path: Path, target: Path, dtype: torch.dtype = torch.float32) -> Eagle3Drafter:
    weights = load_file(target / "model.safetensors")
    return Eagle3Drafter.load(
        path,
        device=torch.device("cpu"),
        dtype=dtype,
        target_embedding=weights["model.embed_tokens.weight"].to(dtype),
        target_lm_head=weights["lm_head.weight"].to(dtype),
    )


def test_kv_only_pass_stores_what_the_full_pass_stores(checkpoint: Path, target: Path) -> None:
    drafter = load(checkpoint, target)
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


def test_saving_reproduces_the_file(checkpoint: Path, target: Path, tmp_path: Path) -> None:
    load(checkpoint, target).save(tmp_path / "again", torch.float32)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_draft_ids_map_to_target_ids(checkpoint: Path, target: Path) -> None:
    drafter = load(checkpoint, target)
    d2t = load_file(checkpoint / "model.safetensors")["d2t"]
    ids = torch.tensor([[0, 5], [99, 40]])
    assert drafter.target_ids(ids).tolist() == (d2t[ids] + ids).tolist()


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 64}, r"mlp.gate_proj.weight \[128, 64\]"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral' is unknown"),
    ],
)
def test_config_that_does_not_fit(
    checkpoint: Path, target: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint, target)


def test_the_last_of_two_layers_is_ingested_behind_the_attention_of_the_first(
    tmp_path: Path, target: Path
) -> None:
    drafter = load(tiny_eagle3(tmp_path / "two", target, num_layers=2), target)
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
