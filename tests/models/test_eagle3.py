"""The EAGLE-3 drafter against a plain fp32 derivation, its file format and its errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_eagle3, tiny_target
from torch import Tensor

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.eagle3 import Eagle3Drafter

HEADS, KV_HEADS, SIZE, EPS = 4, 2, 16, 1e-5
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


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one sequence, a loop over heads and rows."""
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        for row in range(len(q)):
            scores = k[: row + 1, shared] @ q[row, head] / q.shape[2] ** 0.5
            out[row, head] = scores.softmax(0) @ v[: row + 1, shared]
    return out


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rope(x: Tensor, theta: float) -> Tensor:
    """Complex rotation of [T, heads, D] at positions 0…T-1."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    turned = (
        torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat([turned.real, turned.imag], -1)


def reference(weights: dict[str, Tensor], embedding: Tensor, tokens: Tensor, features: Tensor, theta: float):
    w = {name.removeprefix("midlayer."): value.float() for name, value in weights.items()}
    hidden = features @ w["fc.weight"].T
    entry = torch.cat(
        [norm(embedding[tokens], w["input_layernorm.weight"]), norm(hidden, w["hidden_norm.weight"])], -1
    )
    q, k, v = ((entry @ w[f"self_attn.{n}_proj.weight"].T).view(len(tokens), -1, SIZE) for n in "qkv")
    mixed = causal(0, rope(q, theta), rope(k, theta), v).reshape(len(tokens), -1)
    hidden = hidden + mixed @ w["self_attn.o_proj.weight"].T
    inner = norm(hidden, w["post_attention_layernorm.weight"])
    gate = torch.nn.functional.silu(inner @ w["mlp.gate_proj.weight"].T)
    hidden = hidden + (gate * (inner @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return hidden, norm(hidden, w["norm.weight"]) @ w["lm_head.weight"].T


def test_forward_matches_the_derivation(checkpoint: Path, target: Path) -> None:
    drafter = load(checkpoint, target)
    torch.manual_seed(0)
    tokens, features = torch.randint(0, 300, (LENGTH,)), torch.randn(LENGTH, 3 * 64)
    theta = drafter.config.rope["rope_theta"]
    hidden, logits = reference(
        load_file(checkpoint / "model.safetensors"), drafter.target_embedding, tokens, features, theta
    )
    with torch.no_grad():
        step = drafter(tokens, drafter.fuse(features), torch.arange(LENGTH), causal)
    torch.testing.assert_close(step.hidden, hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drafter.logits(step.logits_hidden), logits, rtol=1e-4, atol=1e-4)


def test_kv_only_pass_stores_what_the_full_pass_stores(checkpoint: Path, target: Path) -> None:
    drafter = load(checkpoint, target)
    tokens, features = torch.randint(0, 300, (LENGTH,)), torch.randn(LENGTH, 3 * 64)
    positions = torch.arange(40, 40 + LENGTH)
    stored: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stored.extend([k, v])
        return q

    with torch.no_grad():
        drafter(tokens, drafter.fuse(features), positions, attend)
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


def edit_weights(path: Path, **changes: Tensor | None) -> None:
    weights = load_file(path / "model.safetensors") | changes
    save_file(
        {name: value for name, value in weights.items() if value is not None}, path / "model.safetensors"
    )


def test_missing_file(checkpoint: Path, target: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        load(checkpoint, target)


def test_truncated_file(checkpoint: Path, target: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load(checkpoint, target)


def test_map_out_of_range(checkpoint: Path, target: Path) -> None:
    edit_weights(checkpoint, d2t=torch.full((100,), 300))
    with pytest.raises(CheckpointError, match="d2t maps to token 320"):
        load(checkpoint, target)


def test_missing_map(checkpoint: Path, target: Path) -> None:
    edit_weights(checkpoint, d2t=None)
    with pytest.raises(CheckpointError, match="lack d2t"):
        load(checkpoint, target)


def test_wrong_hidden_size_of_the_target(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden size 64, the embedding handed in has 32"):
        Eagle3Drafter.load(
            checkpoint,
            device=torch.device("cpu"),
            dtype=torch.float32,
            target_embedding=torch.zeros(320, 32),
            target_lm_head=None,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, "target of hidden size 32"),
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
        return causal(layer, q, k, v)

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
