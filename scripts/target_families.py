"""Targets that WHIFLASH serves, with the evidence: the classes of SGLang 0.5.23 whose layers' outputs can be captured.

`scripts/reference.py` writes it into the documentation, and `tests/targets/` holds it against SGLang. No server reads
it: conditions on a target's configuration refuse it (:mod:`whiflash_sglang.engine.launch.refusals`).
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Shown(StrEnum):
    """Status of a family of targets, as its row shows it."""

    CPU = "tested"
    UNTRIED = "untested"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class TargetFamily:
    """A family of targets. architectures: as in `config.json`. kind: of its layers. note: a remark for its row."""

    architectures: tuple[str, ...]
    kind: str
    shown: Shown
    note: str = ""


_ROWS = """
tested | dense | | LlamaForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
tested | dense | | Phi3ForCausalLM ApertusForCausalLM MistralForCausalLM Ministral3ForCausalLM
untested | dense | | InternLM3ForCausalLM IQuestCoderForCausalLM NanbeigeForCausalLM BeamForCausalLM
    TeleFLMForCausalLM
tested | mixture of experts | | Qwen2MoeForCausalLM Qwen3MoeForCausalLM Glm4MoeForCausalLM
untested | mixture of experts | | BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM
    MellumForCausalLM MiniMaxM2ForCausalLM SarvamMoEForCausalLM
tested | sliding windows, scaled embedding, tied head | | Gemma3ForCausalLM
tested | sliding windows, scaled embedding, tied head | published checkpoints need
    `--swa-full-tokens-ratio`: their windowed layers have other KV heads | Gemma4ForCausalLM
tested | mixture of experts, sliding windows | | LagunaForCausalLM
tested | mixture of experts, sliding windows, attention sinks | | GptOssForCausalLM
untested | mixture of experts, sliding windows | | ExaoneMoEForCausalLM ExaoneMoeForCausalLM
untested | mixture of experts, sliding windows | published checkpoints need
    `--swa-full-tokens-ratio`: their windowed layers have other KV heads | MiMoV2ForCausalLM MiMoV2FlashForCausalLM
tested | mixture of experts, latent attention (MLA) | | DeepseekV2ForCausalLM DeepseekV3ForCausalLM
    Glm4MoeLiteForCausalLM
untested | mixture of experts, latent attention (MLA) | | LongcatFlashForCausalLM MistralLarge3ForCausalLM
untested | mixture of experts, sparse attention | | MiniMaxM3SparseForCausalLM
refused | mixture of experts, sparse attention (DSA) | | DeepseekV32ForCausalLM GlmMoeDsaForCausalLM
refused | recurrent or convolution layers | | KimiK3LinearForCausalLM NemotronHPuzzleForCausalLM
tested | mixture of experts, latent attention (MLA), gated delta rule by channel (KDA) | | KimiLinearForCausalLM
tested | Mamba 2 | | NemotronHForCausalLM
tested | short convolutions | text only | Lfm2ForCausalLM Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration
tested | gated delta rule | | Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM
tested | gated delta rule, images or sound | text and images | Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForConditionalGeneration
untested | gated delta rule, images or sound | text only | MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration
untested | sliding windows | | MuseGlimmerForCausalLM
refused | attention within chunks | | Llama4ForCausalLM Llama4ForConditionalGeneration
tested | positions in three dimensions (M-RoPE), images or sound | text and images
    | Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
tested | sliding windows, images or sound | text only | Gemma3ForConditionalGeneration
tested | sliding windows, images or sound | text only; published checkpoints need
    `--swa-full-tokens-ratio`: their windowed layers have other KV heads | Gemma4ForConditionalGeneration
untested | images or sound | text only | Cosmos3ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
    InternS1ProForConditionalGeneration KimiK25ForConditionalGeneration MiniMaxM3SparseForConditionalGeneration
    MuseGlimmerForConditionalGeneration MuseSparkForConditionalGeneration
refused | recurrent or convolution layers, images or sound | | Glm5NextForConditionalGeneration
    InklingForConditionalGeneration InternS2MobiusForConditionalGeneration InternS2PreviewForConditionalGeneration
    KimiK3ForConditionalGeneration MiniCPMV NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2
    NemotronH_Omni_Reasoning_V3 Qwen4ExpForConditionalGeneration
"""
"""Status, kind of layers, note and names of each family; a longer row continues on indented lines."""

FAMILIES: tuple[TargetFamily, ...] = tuple(
    TargetFamily(tuple(names.split()), " ".join(kind.split()), Shown(shown.strip()), " ".join(note.split()))
    for shown, kind, note, names in (row.split("|") for row in re.split(r"\n(?=\w)", _ROWS.strip()))
)
