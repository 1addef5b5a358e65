"""Targets that WHIFLASH serves, with the evidence: the classes of SGLang 0.5.23 whose layers' outputs can be captured.

`scripts/reference.py` writes it into the documentation, and `tests/targets/` holds it against SGLang. No server reads
it: conditions on a target's configuration refuse it (:mod:`whiflash_sglang.compat.launch.refusals`).
"""

from dataclasses import dataclass
from enum import StrEnum


class Shown(StrEnum):
    """What is known of a family."""

    CPU = "tested"
    UNTRIED = "untested"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class TargetFamily:
    """architectures: as `config.json` names them. kind: what sets its layers apart. note: what else is to be said."""

    architectures: tuple[str, ...]
    kind: str
    shown: Shown
    note: str = ""


_MOE, _WINDOWS, _MLA = "mixture of experts", "sliding windows", "latent attention (MLA)"
_RECURRENT, _IMAGES = "recurrent or convolution layers", "images or sound"
_TEXT = "text only"
_BY_ROW = "not with `flashinfer`"
_ONE_SHAPE = "published checkpoints are refused: their windowed layers have other KV heads"

FAMILIES: tuple[TargetFamily, ...] = (
    TargetFamily(("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"), "dense", Shown.CPU),
    TargetFamily(
        ("Phi3ForCausalLM", "ApertusForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM"),
        "dense",
        Shown.CPU,
    ),
    TargetFamily(
        (
            "InternLM3ForCausalLM",
            "IQuestCoderForCausalLM",
            "NanbeigeForCausalLM",
            "BeamForCausalLM",
            "TeleFLMForCausalLM",
        ),
        "dense",
        Shown.UNTRIED,
    ),
    TargetFamily(("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"), _MOE, Shown.CPU),
    TargetFamily(
        (
            "BailingMoEForCausalLM",
            "BailingMoeForCausalLM",
            "BailingMoeV2ForCausalLM",
            "MellumForCausalLM",
            "MiniMaxM2ForCausalLM",
            "SarvamMoEForCausalLM",
        ),
        _MOE,
        Shown.UNTRIED,
    ),
    TargetFamily(("Gemma3ForCausalLM",), f"{_WINDOWS}, scaled embedding, tied head", Shown.CPU, _BY_ROW),
    TargetFamily(
        ("Gemma4ForCausalLM",),
        f"{_WINDOWS}, scaled embedding, tied head",
        Shown.CPU,
        f"{_BY_ROW}; {_ONE_SHAPE}",
    ),
    TargetFamily(("LagunaForCausalLM",), f"{_MOE}, {_WINDOWS}", Shown.CPU, _BY_ROW),
    TargetFamily(("GptOssForCausalLM",), f"{_MOE}, {_WINDOWS}, attention sinks", Shown.CPU, _BY_ROW),
    TargetFamily(
        ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"), f"{_MOE}, {_WINDOWS}", Shown.UNTRIED, _BY_ROW
    ),
    TargetFamily(
        ("MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"),
        f"{_MOE}, {_WINDOWS}",
        Shown.UNTRIED,
        f"{_BY_ROW}; {_ONE_SHAPE}",
    ),
    TargetFamily(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"),
        f"{_MOE}, {_MLA}",
        Shown.CPU,
    ),
    TargetFamily(("LongcatFlashForCausalLM", "MistralLarge3ForCausalLM"), f"{_MOE}, {_MLA}", Shown.UNTRIED),
    TargetFamily(
        (
            "DeepseekV32ForCausalLM",
            "GlmMoeDsaForCausalLM",
            "MiniMaxM3SparseForCausalLM",
        ),
        f"{_MOE}, sparse attention",
        Shown.UNTRIED,
    ),
    TargetFamily(
        ("KimiK3LinearForCausalLM", "NemotronHPuzzleForCausalLM"),
        _RECURRENT,
        Shown.REFUSED,
    ),
    TargetFamily(
        ("KimiLinearForCausalLM",),
        f"{_MOE}, {_MLA}, gated delta rule by channel (KDA)",
        Shown.CPU,
    ),
    TargetFamily(("NemotronHForCausalLM",), "Mamba 2", Shown.CPU),
    TargetFamily(
        ("Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Lfm2VlForConditionalGeneration"),
        "short convolutions",
        Shown.CPU,
        _TEXT,
    ),
    TargetFamily(
        (
            "Qwen3NextForCausalLM",
            "Qwen3_5ForCausalLM",
            "Qwen3_5MoeForCausalLM",
            "Qwen3_5ForConditionalGeneration",
        ),
        "gated delta rule",
        Shown.CPU,
        _TEXT,
    ),
    TargetFamily(
        (
            "Qwen3_5MoeForConditionalGeneration",
            "MiniCPMV4_6ForConditionalGeneration",
            "MiniCPMV4_7ForConditionalGeneration",
        ),
        f"gated delta rule, {_IMAGES}",
        Shown.UNTRIED,
        _TEXT,
    ),
    TargetFamily(("MuseGlimmerForCausalLM",), _WINDOWS, Shown.UNTRIED, _BY_ROW),
    TargetFamily(
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"), "attention within chunks", Shown.REFUSED
    ),
    TargetFamily(
        (
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
        ),
        f"positions in three dimensions (M-RoPE), {_IMAGES}",
        Shown.CPU,
        _TEXT,
    ),
    TargetFamily(
        ("Gemma3ForConditionalGeneration",), f"{_WINDOWS}, {_IMAGES}", Shown.CPU, f"{_TEXT}, {_BY_ROW}"
    ),
    TargetFamily(
        ("Gemma4ForConditionalGeneration",),
        f"{_WINDOWS}, {_IMAGES}",
        Shown.CPU,
        f"{_TEXT}, {_BY_ROW}; {_ONE_SHAPE}",
    ),
    TargetFamily(
        (
            "Cosmos3ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
            "InternS1ProForConditionalGeneration",
            "KimiK25ForConditionalGeneration",
            "MiniMaxM3SparseForConditionalGeneration",
            "MuseGlimmerForConditionalGeneration",
            "MuseSparkForConditionalGeneration",
        ),
        _IMAGES,
        Shown.UNTRIED,
        _TEXT,
    ),
    TargetFamily(
        (
            "Glm5NextForConditionalGeneration",
            "InklingForConditionalGeneration",
            "InternS2MobiusForConditionalGeneration",
            "InternS2PreviewForConditionalGeneration",
            "KimiK3ForConditionalGeneration",
            "MiniCPMV",
            "NemotronH_Nano_Omni_Reasoning_V3",
            "NemotronH_Nano_VL_V2",
            "NemotronH_Omni_Reasoning_V3",
            "Qwen4ExpForConditionalGeneration",
        ),
        f"{_RECURRENT}, {_IMAGES}",
        Shown.REFUSED,
    ),
)
