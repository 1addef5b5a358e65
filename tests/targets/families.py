"""Tiny random targets of SGLang's model families, in the files that Hugging Face's own classes write.

`config.json` and tensor names are therefore those of published checkpoints, and the class that wrote them computes what
SGLang's class is compared with.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAVOURED_TOKENS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, MASK_TOKEN, MAX_POSITIONS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

VOCAB, LAYERS = 320, 6
WINDOW = 8
"""Tokens that a windowed layer sees: fewer than a block of drafts and its prompt."""

EXPERTS: Mapping[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": HEADS,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Family:
    """kind: of Hugging Face's configuration. architecture: SGLang's class. changes: keys beside the common ones.

    embedding_scale: of the random embedding, where the model multiplies it by a large number itself. tolerance: of
    features, where SGLang keeps weights that are no matrices in bfloat16. captured: whether SGLang captures
    what layers put out; of Gemma 3 it leaves out the residual. tower: of a model that takes images too, what is said of
    the part that reads them; `changes` are then its text model's. published: names of its tensors in published files,
    by how this version of Hugging Face's class writes them; transposed: what of them is published the other way round.
    said: keys as published files have them and this version's do not.
    """

    kind: str
    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    embedding_scale: float = 1.0
    tolerance: float = 1e-3
    captured: bool = True
    tower: Mapping[str, Any] | None = None
    published: Mapping[str, str] = field(default_factory=dict)
    transposed: str | None = None
    said: Mapping[str, Any] = field(default_factory=dict)


def windowed(full: Sequence[int]) -> dict[str, Any]:
    """Layers with a window, all but those in `full`."""
    kinds = ["full_attention" if layer in full else "sliding_attention" for layer in range(LAYERS)]
    return {"sliding_window": WINDOW, "layer_types": kinds}


CONVOLUTIONS = {
    "layer_types": ["conv" if layer % 2 == 0 else "full_attention" for layer in range(LAYERS)],
    "tie_word_embeddings": True,
}
DELTA = {
    "layer_types": ["full_attention" if layer % 3 == 2 else "linear_attention" for layer in range(LAYERS)],
    "full_attention_interval": 3,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
KDA = {
    **EXPERTS,
    **LATENT,
    "q_lora_rank": None,
    "n_shared_experts": 1,
    "layer_types": DELTA["layer_types"],
    "linear_head_dim": HEAD_DIM,
    "linear_num_heads": 4,
}
KDA_LAYERS = {
    "kda_layers": [1, 2, 4, 5],
    "full_attn_layers": [3, 6],
    "head_dim": HEAD_DIM,
    "num_heads": 4,
    "short_conv_kernel_size": 4,
}
"""As published: layers count from one."""
MAMBA2 = ("mamba", "mlp", "attention", "mamba", "mlp", "attention")
HF_BLOCKS = {"mamba": "linear_attention", "mlp": "mlp", "attention": "full_attention"}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
INTERLEAVED = {"rope_parameters": {**SECTIONS["rope_parameters"], "mrope_interleaved": True}}
PARTIAL = {
    "rope_parameters": {**INTERLEAVED["rope_parameters"], "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
}
TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "fullatt_block_indexes": [0],
}
TABLED = {**TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
DEEPSTACK = {**TABLED, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]}
"""SGLang adds the outputs of three tower layers to as many of the model's, whatever the configuration says."""
SIGLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER_OF_GEMMA4 = {**SIGLIP, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16}
"""SGLang builds every tower; `test_images.py` looks through Qwen's."""

GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    {**windowed((2, 5)), "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": True},
    embedding_scale=0.1,
    captured=False,
)

GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    {
        **windowed((2, 5)),
        "global_head_dim": HEAD_DIM,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB,
        "tie_word_embeddings": True,
    },
    embedding_scale=0.1,
)

FAMILIES = {
    family.architecture: family
    for family in (
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
        Family("phi3", "Phi3ForCausalLM"),
        Family("apertus", "ApertusForCausalLM", tolerance=0.05),
        Family("mistral", "MistralForCausalLM", {"sliding_window": None}),
        Family("ministral3", "Ministral3ForCausalLM"),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            {**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
        ),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", {**EXPERTS, "decoder_sparse_step": 1}),
        Family("glm4_moe", "Glm4MoeForCausalLM", {**ROUTED, "partial_rotary_factor": 0.5}),
        Family("laguna", "LagunaForCausalLM", {**EXPERTS, **windowed((0, 4))}),
        GEMMA3,
        GEMMA4,
        Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", {**ROUTED, **LATENT}),
        Family(
            "deepseek_v2",
            "DeepseekV2ForCausalLM",
            {
                **ROUTED,
                **LATENT,
                "topk_method": "greedy",
                "norm_topk_prob": False,
                "scoring_func": "softmax",
                "moe_layer_freq": 1,
                "rope_parameters": YARN,
            },
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            {
                **ROUTED,
                **LATENT,
                "n_group": 2,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "moe_layer_freq": 1,
                "rope_parameters": YARN,
            },
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            {**windowed((1, 3, 5)), "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        Family("lfm2", "Lfm2ForCausalLM", {**CONVOLUTIONS, "block_auto_adjust_ff_dim": False}),
        Family("lfm2_moe", "Lfm2MoeForCausalLM", {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1}),
        Family(
            "qwen3_next",
            "Qwen3NextForCausalLM",
            {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 32, "partial_rotary_factor": 0.5},
        ),
        Family("qwen3_5_text", "Qwen3_5ForCausalLM", DELTA),
        Family("qwen3_5", "Qwen3_5ForConditionalGeneration", {**DELTA, **PARTIAL}, tower=TABLED),
        Family(
            "lfm2_vl",
            "Lfm2VlForConditionalGeneration",
            {**CONVOLUTIONS, "block_auto_adjust_ff_dim": False},
            tower=SIGLIP,
        ),
        Family(
            "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 32}
        ),
        Family(
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
            {**EXPERTS, **DELTA, **PARTIAL, "shared_expert_intermediate_size": 32},
            tower=TABLED,
        ),
        Family(
            "kimi_linear",
            "KimiLinearForCausalLM",
            KDA,
            # Hugging Face's class writes its dense layer by the name of the others.
            published={"layers.0.block_sparse_moe.": "layers.0.mlp."},
            said={"linear_attn_config": KDA_LAYERS, "first_k_dense_replace": 1},
        ),
        Family(
            "nemotron_h",
            "NemotronHForCausalLM",
            {
                "layers_block_type": [HF_BLOCKS[block] for block in MAMBA2],
                "num_hidden_layers": LAYERS,
                "ssm_state_size": HEAD_DIM,
                "mamba_num_heads": 8,
                "mamba_head_dim": HEAD_DIM,
                "n_groups": 2,
                "chunk_size": 64,
            },
            said={"layers_block_type": list(MAMBA2), "mamba_n_groups": 2},
        ),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", SECTIONS, tower=TOWER),
        Family("qwen3_vl", "Qwen3VLForConditionalGeneration", INTERLEAVED, tower=DEEPSTACK),
        Family(
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
            {**INTERLEAVED, **EXPERTS, "decoder_sparse_step": 1},
            tower=DEEPSTACK,
            transposed=".mlp.experts.",
        ),
        replace(
            GEMMA3,
            kind="gemma3",
            architecture="Gemma3ForConditionalGeneration",
            tower={**SIGLIP, "vision_use_head": False},
            published={"vision_tower.": "vision_tower.vision_model."},
        ),
        replace(GEMMA4, kind="gemma4", architecture="Gemma4ForConditionalGeneration", tower=TOWER_OF_GEMMA4),
    )
}


class HuggingFace:
    """The model in Hugging Face's class, on whole sequences in fp32."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def features(self, tokens: Sequence[int], layers: Sequence[int]) -> torch.Tensor:
        """[T, len(layers) * H]: outputs of `layers`, side by side."""
        states = self.model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
        return torch.cat([states[layer + 1][0] for layer in layers], -1)

    @torch.inference_mode()
    def states(self, tokens: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """States of each recurrent layer after `tokens`: its convolution's last inputs [D, taps], and its matrix or
        None, as SGLang keeps it: [H, V, K], Mamba 2's [H, P, N].
        """
        cache = self.model(torch.tensor([tokens]), use_cache=True).past_key_values
        kept = [layer for layer in cache.layers if getattr(layer, "conv_states", {}).get(0) is not None]
        swapped = self.model.config.model_type != "nemotron_h"
        found = []
        for layer in kept:
            matrix = layer.recurrent_states[0]
            if matrix is not None:
                matrix = matrix[0].transpose(1, 2) if swapped else matrix[0]
            found.append((layer.conv_states[0][0], matrix))
        return found

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """[V], of the token after `tokens`."""
        found: torch.Tensor = self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return found

    def lead(self, tokens: Sequence[int], first: int, second: int) -> float:
        """How far the logit of `first` is ahead of that of `second` after `tokens`."""
        logits = self.logits(tokens)
        return float(logits[first] - logits[second])


def tiny_family(directory: Path, family: Family) -> HuggingFace:
    """Write a target of `family` into `directory`; returns the same weights in Hugging Face's class."""
    common = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = {**common, **family.changes}
        if family.tower is None:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **text), dtype=torch.float32)
        else:
            whole = {"text_config": text, "vision_config": dict(family.tower)}
            tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
            model = AutoModelForImageTextToText.from_config(
                AutoConfig.for_model(family.kind, **whole, **tied), dtype=torch.float32
            )
        with torch.no_grad():
            _enliven(model, family)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for ours, theirs in family.published.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    for name in tensors:
        if family.transposed is not None and family.transposed in name:
            tensors[name] = tensors[name].transpose(-1, -2).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # Published files have keys that this version of Hugging Face's classes leaves out and SGLang's read.
    file = directory / "config.json"
    said = json.loads(file.read_text())
    inner = said if family.tower is None else said["text_config"]
    inner.update({key: value for key, value in family.changes.items() if key not in inner} | dict(family.said))
    file.write_text(json.dumps(said))
    return HuggingFace(model)


def _enliven(model: Any, family: Family) -> None:
    for name, weight in model.named_parameters():
        if "sinks" in name:  # SGLang keeps them in bfloat16
            weight.copy_(torch.randn_like(weight).bfloat16())
        elif name.endswith("bias"):
            weight.normal_(0, 0.1)
    # Drafters share the target's head: let them be right now and then (`tiny_models.py`).
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    head[list(FAVOURED_TOKENS)] *= 2
    if head is embedding:
        embedding *= family.embedding_scale
    else:
        embedding[MASK_TOKEN] = head[list(FAVOURED_TOKENS)].sum(0)
