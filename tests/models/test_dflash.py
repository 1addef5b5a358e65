"""The DFlash drafter against a plain fp32 derivation, its file format and its errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_dflash, tiny_target
from torch import Tensor

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.models.dflash import DFlashDrafter

SIZE, EPS = 16, 1e-5
CONTEXT, BLOCK = 6, 8


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


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    turned = (
        torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat([turned.real, turned.imag], -1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        out[:, head] = (q[:, head] @ k[:, shared].T / q.shape[2] ** 0.5).softmax(-1) @ v[:, shared]
    return out


def reference(w: dict[str, Tensor], drafter: DFlashDrafter, features: Tensor, tokens: Tensor) -> Tensor:
    """One block after CONTEXT tokens, drafted with everything in one list of keys."""
    theta = drafter.config.rope["rope_theta"]
    context = norm(features @ w["fc.weight"].T, w["hidden_norm.weight"])
    hidden = drafter.target_embedding[tokens]
    places = torch.arange(CONTEXT + len(tokens))
    for layer in range(drafter.num_layers):
        get = {
            name.split(f"layers.{layer}.")[-1]: value
            for name, value in w.items()
            if f"layers.{layer}." in name
        }
        inner = norm(hidden, get["input_layernorm.weight"])
        both = torch.cat([context, inner])
        q = (inner @ get["self_attn.q_proj.weight"].T).view(len(tokens), -1, SIZE)
        k, v = ((both @ get[f"self_attn.{n}_proj.weight"].T).view(len(both), -1, SIZE) for n in "kv")
        q = rope(norm(q, get["self_attn.q_norm.weight"]), places[CONTEXT:], theta)
        k = rope(norm(k, get["self_attn.k_norm.weight"]), places, theta)
        hidden = hidden + attention(q, k, v).reshape(len(tokens), -1) @ get["self_attn.o_proj.weight"].T
        inner = norm(hidden, get["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(inner @ get["mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (inner @ get["mlp.up_proj.weight"].T)) @ get["mlp.down_proj.weight"].T
    return norm(hidden, w["norm.weight"]) @ drafter.target_lm_head.T


def test_a_block_matches_the_derivation(checkpoint: Path, target: Path) -> None:
    drafter = load(checkpoint, target)
    torch.manual_seed(0)
    weights = {name: value.float() for name, value in load_file(checkpoint / "model.safetensors").items()}
    for name in weights:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = torch.rand(SIZE) + 0.5
            layer = int(name.split(".")[1])
            attn = drafter.layers[layer].attention
            (attn.q_norm if "q_norm" in name else attn.k_norm).weight.data.copy_(weights[name])
    drafter.train().eval()  # the stacked projection holds the norms of before
    features = torch.randn(CONTEXT, len(drafter.target_layer_ids) * 64)
    tokens = torch.tensor([70] + [drafter.mask_token_id] * (BLOCK - 1))
    with torch.no_grad():
        keys, values = drafter.keys_values(drafter.fuse(features), torch.arange(CONTEXT))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, torch.cat([keys[layer], k]), torch.cat([values[layer], v]))

        states = drafter(tokens[None], torch.arange(CONTEXT, CONTEXT + BLOCK)[None], attend)[0]
        expected = reference(weights, drafter, features, tokens)
    torch.testing.assert_close(drafter.logits(states), expected, rtol=1e-4, atol=1e-4)


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
        ({"block_size": 0}, "block_size must be an integer of at least 2"),
        ({"block_size": 1}, "block_size must be an integer of at least 2"),
        (
            {"dflash_config": {"mask_token_id": 320, "target_layer_ids": [1]}},
            "mask_token_id 320 is not in the target's vocabulary of 320",
        ),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 99]}}, r"names layers \[99\]"),
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


def test_truncated_file(checkpoint: Path, target: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load(checkpoint, target)
