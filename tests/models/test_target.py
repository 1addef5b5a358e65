"""Our target forward against transformers' own, for the three architectures that it covers."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from whiflash_sglang.models.target import TargetModel

SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
CONFIGS = {
    "llama": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
}


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_layer_outputs_and_logits_match(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MODELS[kind](CONFIGS[kind]).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = TargetModel(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(0, 90, (50,))
    with torch.no_grad():
        expected = theirs(tokens[None], output_hidden_states=True)
    output = ours.forward(tokens, capture=[0, 1])
    for index, layer in enumerate([0, 1]):
        torch.testing.assert_close(
            output.features[:, index], expected.hidden_states[layer + 1][0], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(output.final, expected.hidden_states[-1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits(output.final), expected.logits[0], rtol=1e-4, atol=1e-4)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ValueError, match="is a GPT2LMHeadModel"):
        TargetModel(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
