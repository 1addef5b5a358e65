"""Positions in three dimensions (M-RoPE) of the rows of a verification.

A target that takes images counts a token's time, height and width. Those of text are equal, and WHIFLASH serves text
alone (:mod:`whiflash_sglang.compat.admission`). SGLang lays them out for drafts of one length.
"""

from functools import wraps
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from whiflash_sglang.compat.patching import replace


def install() -> None:
    """Idempotent."""
    replace(ForwardBatch, "compute_spec_mrope_positions", _of_packed_rows)


def _of_packed_rows(original: Any) -> Any:
    """`mrope_positions` [3, T] int64 of T rows, packed by a layout of any widths and padded behind."""

    @wraps(original)
    def compute(self: ForwardBatch, model_runner: Any, batch: Any, *args: Any, **named: Any) -> None:
        if getattr(batch.spec_info, "ragged_verify_layout", None) is None:
            original(self, model_runner, batch, *args, **named)
            return
        self.mrope_positions = batch.spec_info.positions.to(torch.int64).repeat(3, 1)

    return compute
