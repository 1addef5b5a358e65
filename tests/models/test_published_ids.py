"""Published checkpoints by what their `config.json` files say: facts, each with where it was read. No file is copied.

Asserted are the format, the target that it fits, which layers it reads, how many tokens it drafts, what its KV costs.
Formats whose tiny files have the published layout (`chosen_formats.py`, `test_dspark.py`) are asked on those.
"""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import chosen_formats
import pytest
from published import TARGET_LAYERS, refused, write
from test_dspark import DEEPSPEC

from whiflash_lab.bench.arms import DRAFTERS
from whiflash_sglang.checkpoints.fit import TargetShape, check_fit, target_layers
from whiflash_sglang.formats.draft_format import DraftFormat
from whiflash_sglang.formats.table import FORMATS, read_draft

QWEN3_8B = TargetShape(4096, 36, 151936)
QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
}
OF_QWEN3_8B = QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936}
NAMES = {"XPress": "xPress"}


class Published(NamedTuple):
    """A checkpoint's configuration, and what must be made of it. layers: their number itself for a target's own head.
    drafts: None for a chain. kv_bytes: of a token, in bf16.
    """

    config: dict[str, Any]
    target: TargetShape
    format: str
    layers: tuple[int, ...]
    drafts: int | None
    kv_bytes: int


IDS = {
    # z-lab/Qwen3.5-35B-A3B-DFlash, its config.json: block size nested, five windowed layers and a full one, 8 features
    "DFlash of Qwen3.5-35B-A3B": Published(
        QWEN3
        | {"architectures": ["DFlashDraftModel"], "hidden_size": 2048, "intermediate_size": 6144}
        | {"vocab_size": 248320, "num_hidden_layers": 6, "num_target_layers": 40, "sliding_window": 4096}
        | {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "max_window_layers": 6}
        | {
            "dflash_config": {"block_size": 16, "mask_token_id": 248077}
            | {"target_layer_ids": [1, 6, 11, 16, 22, 27, 32, 37]}
        },
        TargetShape(2048, 40, 248320),
        "DFlash",
        (1, 6, 11, 16, 22, 27, 32, 37),
        15,
        24576,
    ),
    # SpecForge, configs/qwen3-8b-eagle3.json
    "EAGLE-3 of Qwen3-8B": Published(
        OF_QWEN3_8B
        | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
        | {"draft_vocab_size": 32000, "tie_word_embeddings": False},
        QWEN3_8B,
        "EAGLE-3",
        (1, 17, 32),
        None,
        4096,
    ),
    # RedHatAI/gpt-oss-20b-speculator.eagle3: one norm over the features, layers left to the default
    "speculator of gpt-oss-20b": Published(
        {"architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "draft_vocab_size": 64000}
        | {"norm_before_fc": True, "norm_before_residual": True}
        | {
            "transformer_layer_config": {"model_type": "llama", "hidden_size": 2880, "num_hidden_layers": 1}
            | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880}
            | {"vocab_size": 201088, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        },
        TargetShape(2880, 24, 201088),
        "speculators EAGLE-3, P-EAGLE",
        (1, 11, 20),
        None,
        2048,
    ),
    # zai-org/GLM-4.5-Air: transformers, configuration_glm4_moe.py has its sizes as defaults
    "GLM-4.5-Air's own head": Published(
        {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "hidden_act": "silu"}
        | {"hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408}
        | {"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True}
        | {"num_hidden_layers": 46, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1}
        | {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1}
        | {"topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "use_qk_norm": False}
        | {"partial_rotary_factor": 0.5, "rope_theta": 1000000, "rope_scaling": None}
        | {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "vocab_size": 151552},
        TargetShape(4096, 46, 151552),
        "GLM-4.5's own head",
        (46,),
        None,
        4096,
    ),
}


@pytest.mark.parametrize("name", IDS)
def test_a_published_checkpoint_is_known_by_its_configuration(name: str, tmp_path: Path) -> None:
    said = IDS[name]
    draft = read_draft(write(tmp_path, said.config, {}))
    check_fit(draft, said.target)
    _, kv_heads, head_dim = draft.config.attention
    assert draft.format.name == said.format
    assert target_layers(draft, said.target.num_layers) == said.layers
    assert getattr(draft.config, "max_drafts", None) == said.drafts
    assert 2 * draft.config.num_layers * kv_heads * head_dim * 2 == said.kv_bytes


TINY = {name: config for name, (config, _) in chosen_formats.FORMATS.items()} | {"DSpark": DEEPSPEC}


@pytest.mark.parametrize("name", TINY)
def test_a_block_drafter_reads_the_layers_that_it_names(name: str, tmp_path: Path) -> None:
    draft = read_draft(write(tmp_path, TINY[name], {}))
    assert draft.format.name == NAMES.get(name, name)
    assert target_layers(draft, TARGET_LAYERS) == (1, 4, 8)
    assert draft.config.max_drafts == (8 if name == "FlashMap" else 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dflash_config": {"selector_rank": 64, "mask_token_id": 1}}, "selector_rank 64 belongs to a drafter"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "dflash_config": {}},
            r"architectures \['Qwen3ForCausalLM'\] is no draft",
        ),
    ],
)
def test_what_is_not_loaded_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(tmp_path, IDS["DFlash of Qwen3.5-35B-A3B"].config | changes, message)


def test_a_key_belongs_to_one_format() -> None:
    assert len({key for one in FORMATS for key in one.keys}) == sum(len(one.keys) for one in FORMATS)


def test_every_format_says_what_serves_it_upstream() -> None:
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(DraftFormat))
    for one in FORMATS:
        assert one.upstream in (None, "EAGLE") or one.arm in DRAFTERS[one.upstream], one.name
