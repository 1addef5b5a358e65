"""A target's own next-token head is read from its files, experts too, and what cannot draft is refused by name.

Its drafts are compared with SGLang's classes in engines: `targets/test_parity.py`.
"""

import logging
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from served_chains import STEPS, serve
from torch import Tensor
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE

from whiflash_sglang.checkpoints.fit import judge, read_target, target_mtp
from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_sglang.formats.checkpoint import WeightReader
from whiflash_sglang.formats.mtp import Experts, read_routed
from whiflash_sglang.formats.table import read_draft
from whiflash_train.bundle import BundleParts, create

MIMO = published.DIMENSIONS | {
    "architectures": ["MiMoForCausalLM"],
    # Published files say "mimo" and bring a class of that name: Qwen2's, and the next key.
    "model_type": "qwen2",
    "num_nextn_predict_layers": 1,
    "num_hidden_layers": published.TARGET_LAYERS,
    "attention_bias": True,
    "rope_theta": 640000,
    "rope_scaling": None,
    "use_sliding_window": False,
}
GLM = published.DIMENSIONS | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "num_nextn_predict_layers": 1,
    "num_hidden_layers": published.TARGET_LAYERS,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}


def mimo_tensors() -> dict[str, Tensor]:
    """The head of MiMo-7B, by its published names, and the target's matrices that it shares."""
    prefix = "model.mtp_layers.0."
    shapes: published.Shapes = {
        **published.decoder_layer(prefix, bias=True, head_norms=False),
        f"{prefix}input_proj.weight": (published.HIDDEN, 2 * published.HIDDEN),
        **{
            f"{prefix}{name}.weight": (published.HIDDEN,)
            for name in ("token_layernorm", "hidden_layernorm", "final_layernorm")
        },
    }
    del shapes[f"{prefix}self_attn.o_proj.bias"]
    embedding, head = published.target_tensors()
    return published.draw(shapes) | {"model.embed_tokens.weight": embedding, "lm_head.weight": head}


def expert_tensors() -> dict[str, Tensor]:
    """GLM's experts, without their prefix."""
    shapes: published.Shapes = {"gate.weight": (16, published.HIDDEN), "gate.e_score_correction_bias": (16,)}
    for name in (*(f"experts.{i}" for i in range(16)), "shared_experts"):
        shapes |= {f"{name}.{part}_proj.weight": (48, published.HIDDEN) for part in ("gate", "up")}
        shapes[f"{name}.down_proj.weight"] = (published.HIDDEN, 48)
    return published.draw(shapes)


def test_a_head_in_several_files_is_the_one_in_one(tmp_path: Path) -> None:
    one, several = (
        published.write(tmp_path / files, MIMO, mimo_tensors(), files=files) for files in ("one", "sharded")
    )
    drafted, _, _ = serve(one)
    assert drafted == serve(several)[0]
    assert len({token for tokens in drafted for token in tokens}) > STEPS


@pytest.mark.parametrize("rows", [1, 2, 9], ids=["gathered", "gathered, two rows", "all experts"])
@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}])
def test_experts_are_those_of_hugging_faces_layer(rows: int, changes: dict[str, Any], tmp_path: Path) -> None:
    said = GLM | changes
    layer = Glm4MoeMoE(Glm4MoeConfig(**{**said, "experts_implementation": "eager"}))
    weights = expert_tensors()
    ours = Experts(published.HIDDEN, read_routed(tmp_path, said))
    with torch.no_grad():
        ours.fill(WeightReader(tmp_path, weights), "")
        layer.gate.weight.copy_(weights["gate.weight"])
        layer.gate.e_score_correction_bias.copy_(weights["gate.e_score_correction_bias"])
        layer.experts.gate_up_proj.copy_(ours.gate_up)
        layer.experts.down_proj.copy_(ours.down.transpose(1, 2))
        for part in ("gate", "up", "down"):
            getattr(layer.shared_experts, f"{part}_proj").weight.copy_(weights[f"shared_experts.{part}_proj.weight"])
        x = torch.randn(rows, published.HIDDEN, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(ours(x), layer(x[None])[0], rtol=1e-4, atol=1e-4)


def test_a_rounded_model_routes_by_the_gate_as_it_is_published(tmp_path: Path) -> None:
    """Eight bits of mantissa would send rows to other experts than the target's own layers."""
    experts = Experts(published.HIDDEN, read_routed(tmp_path, GLM)).to(torch.bfloat16)
    weights = expert_tensors()
    experts.fill(WeightReader(tmp_path, weights), "")
    assert experts.down.dtype == torch.bfloat16
    assert torch.equal(experts.gate, weights["gate.weight"])
    assert torch.equal(experts.bias, weights["gate.e_score_correction_bias"])


def test_what_a_head_costs_is_said_from_its_configuration(tmp_path: Path) -> None:
    path = published.write(tmp_path / "target", MIMO, {})
    ((_, served, detail),) = judge(str(path), read_target(str(path)))
    kv = 2 * 2 * published.HEAD_DIM * 4
    assert served
    assert detail == (
        f"MiMo's own head, the ar arm; reads what the target's head reads; {kv} bytes of KV a token, "
        f"{1 / published.TARGET_LAYERS:.1%} of the target's"
    )


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (MIMO, {"num_nextn_predict_layers": 0}, "num_nextn_predict_layers is 0: this target has no next-token"),
        (GLM, {"num_nextn_predict_layers": None}, "num_nextn_predict_layers is None: this target has no next"),
        (GLM, {"num_nextn_predict_layers": 3}, "num_nextn_predict_layers is 3; only one next-token head"),
        (MIMO, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config: the next-token head of"),
        (GLM, {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only sigmoid"),
        (GLM, {"moe_intermediate_size": None}, "moe_intermediate_size must be an integer"),
        (
            GLM,
            {"architectures": ["DeepseekV3ForCausalLM"]},
            r"architectures \['DeepseekV3ForCausalLM'\] is no draft architecture",
        ),
    ],
)
def test_a_head_that_cannot_draft(
    config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Named as drafter it is refused; where nobody named it, the log says why it is left."""
    path = tmp_path / "target"
    published.refused(path, config | changes, message)
    with caplog.at_level(logging.WARNING, "whiflash_sglang"):
        assert target_mtp(str(path)) is None
    assert bool(caplog.records) == bool(changes.get("num_nextn_predict_layers", 1))


def test_a_head_is_taken_from_where_its_tensors_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = mimo_tensors()
    path = published.write(tmp_path / "target", MIMO, weights, files="sharded")
    assert target_mtp(str(path)) == path
    bare = {name: value for name, value in weights.items() if "mtp_layers" not in name}
    without = published.write(tmp_path / "without", MIMO, bare)
    assert target_mtp(str(without)) is None
    assert "has no tensors model.mtp_layers.0." in caplog.text
    assert target_mtp(str(tmp_path / "nowhere")) is None
    with pytest.raises(CheckpointError, match=r"lack model\.mtp_layers\.0\."):
        serve(without)


def test_a_bundle_does_not_name_its_target_as_drafter(tmp_path: Path) -> None:
    path = published.write(tmp_path / "target", MIMO, {})
    with pytest.raises(ConfigError, match="is a target with a next-token head of its own, which drafts wherever"):
        create(BundleParts(str(path), str(path), None), tmp_path / "bundle")
    assert read_draft(path).config.vocab_size == published.VOCAB
