"""What the wrapper of the target refuses."""

from types import SimpleNamespace

import pytest
import torch

from whiflash_sglang.compat.target import Target
from whiflash_sglang.errors import CheckpointError


def test_a_target_without_capture_is_named() -> None:
    sizes = SimpleNamespace(hidden_size=8, num_hidden_layers=2, vocab_size=16)
    runner = SimpleNamespace(model=torch.nn.Linear(1, 1), dtype=torch.float32, device="cpu")
    config = SimpleNamespace(hf_text_config=sizes, context_len=32)
    target = Target(SimpleNamespace(model_runner=runner, model_config=config, tokenizer=None))
    with pytest.raises(CheckpointError, match="Linear has no hidden-state capture in SGLang"):
        target.capture([1], final_hidden=False)
