"""Refusals of the target's wrapper."""

import pytest
import torch

from whiflash_sglang.engine.forward.captured import Captured
from whiflash_sglang.errors import CheckpointError


def test_a_target_without_capture_is_named() -> None:
    with pytest.raises(CheckpointError, match="Linear has no hidden-state capture in SGLang"):
        Captured(torch.nn.Linear(1, 1), 2, [1], keeps_final=False)
