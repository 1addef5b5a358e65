"""Published checkpoints by what their `config.json` files say: facts, each with where it was read. No file is copied.

Asserted are the format, the target that it fits, which layers it reads, how many tokens it drafts, what its KV costs.
"""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from published import refused, write

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
SPREAD = [1, 9, 17, 25, 33]
"""Layers of the five-feature drafters of Qwen3-8B."""
BLOCKS = OF_QWEN3_8B | {
    "num_hidden_layers": 5,
    "num_target_layers": 36,
    "layer_types": ["full_attention"] * 5,
}


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
    # SpecForge, configs/qwen3-8b-dflash.json: the layout of z-lab/Qwen3-8B-DFlash-b16
    "DFlash of Qwen3-8B": Published(
        BLOCKS
        | {"architectures": ["DFlashDraftModel"], "block_size": 16}
        | {"sliding_window": None, "use_sliding_window": False}
        | {"dflash_config": {"mask_token_id": 151669, "target_layer_ids": SPREAD}},
        QWEN3_8B,
        "DFlash",
        tuple(SPREAD),
        15,
        20480,
    ),
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
    # deepseek-ai/dspark_qwen3_8b_block7: DeepSpec, deepspec/modeling/dspark/qwen3/config.py and config/dspark
    "DSpark of Qwen3-8B": Published(
        BLOCKS
        | {"architectures": ["Qwen3DSparkModel"], "block_size": 7}
        | {"mask_token_id": 151669, "target_layer_ids": SPREAD}
        | {"num_anchors": 512, "enable_confidence_head": True, "confidence_head_with_markov": True}
        | {"markov_rank": 256, "markov_head_type": "vanilla", "tie_word_embeddings": False},
        QWEN3_8B,
        "DSpark",
        tuple(SPREAD),
        7,
        20480,
    ),
    # SpecForge, configs/qwen3-8b-domino.json
    "Domino of Qwen3-8B": Published(
        OF_QWEN3_8B
        | {"architectures": ["DominoDraftModel"], "auto_map": {"AutoModel": "domino.DominoDraftModel"}}
        | {"num_hidden_layers": 5, "block_size": 16, "num_target_layers": 36, "emb_dim": 256}
        | {
            "dflash_config": {"projector_type": "domino", "pure_draft_prefix_len": 1, "shift_label": True}
            | {"emb_dim": 256, "gru_hidden_dim": 1024, "mask_token_id": 151669, "target_layer_ids": SPREAD}
        },
        QWEN3_8B,
        "Domino",
        tuple(SPREAD),
        15,
        20480,
    ),
    # UIUC-SSAIL/Qwen3-8B-XPress-b16: `convert_xpress_to_vllm.py` of Supercomputing-System-AI-Lab/xPress
    "xPress of Qwen3-8B": Published(
        BLOCKS
        | {"architectures": ["Qwen3XPressModel"], "block_size": 16, "sample_from_anchor": False}
        | {"xpress_rank": 256, "xpress_mlp_hidden": 512, "xpress_block_size": 16, "xpress_num_passes": 6}
        | {"dflash_config": {"mask_token_id": 151669, "target_layer_ids": SPREAD}},
        QWEN3_8B,
        "xPress",
        tuple(SPREAD),
        15,
        20480,
    ),
    # j-shen/FlashMap-Qwen3-8B: flashmap 0.1.0, `configuration_flashmap.py` has its sizes as defaults
    "FlashMap of Qwen3-8B": Published(
        {"architectures": ["FlashMapDraftModel"], "model_type": "flashmap", "target_hidden_size": 4096}
        | {"vocab_size": 151936, "target_layer_ids": SPREAD, "block_size": 16, "hidden_size": 2048}
        | {"num_hidden_layers": 6, "num_attention_heads": 16, "intermediate_size": 8192, "cond_dim": 256}
        | {"num_steps": 1, "jump_grids": {"1": [0.0, 1.0]}, "tie_word_embeddings": False},
        QWEN3_8B,
        "FlashMap",
        tuple(SPREAD),
        16,
        49152,
    ),
    # deepseek-ai/eagle3_qwen3_8b_ttt7: DeepSpec, deepspec/modeling/eagle3/qwen3/config.py and config/eagle3
    "DeepSpec's EAGLE-3 of Qwen3-8B": Published(
        OF_QWEN3_8B
        | {"architectures": ["Qwen3Eagle3Model"], "num_hidden_layers": 1, "num_target_layers": 36}
        | {"layer_types": ["full_attention"], "target_layer_ids": SPREAD, "ttt_length": 7}
        | {"step_loss_decay": 0.8, "draft_num_hidden_layers": 1, "tie_word_embeddings": False},
        QWEN3_8B,
        "DeepSpec EAGLE-3",
        tuple(SPREAD),
        None,
        4096,
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dflash_config": {"selector_rank": 64, "mask_token_id": 1}},
            "selector_rank 64 belongs to a drafter",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "dflash_config": {}},
            r"architectures \['Qwen3ForCausalLM'\] is no draft",
        ),
    ],
)
def test_what_is_not_loaded_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(tmp_path, IDS["DFlash of Qwen3-8B"].config | changes, message)


def test_a_key_belongs_to_one_format() -> None:
    assert len({key for one in FORMATS for key in one.keys}) == sum(len(one.keys) for one in FORMATS)


def test_every_format_says_what_serves_it_upstream() -> None:
    assert all(field.default is MISSING and field.default_factory is MISSING for field in fields(DraftFormat))
    for one in FORMATS:
        assert one.upstream in (None, "EAGLE") or one.arm in DRAFTERS[one.upstream], one.name
