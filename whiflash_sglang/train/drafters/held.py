"""Training of a drafter that serves: what its cached draft KV was made with stays as it is."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.learn.swap import check_kind, first_frozen_row

FUSION = "fc.weight"


class Held:
    """The rows that `learn.swap.first_frozen_row` names, which get no gradients, and are written back at the end.

    Args:
        arm: for messages. drafter: float32, on any device; `requires_grad` of what is held whole becomes False.

    Raises:
        ConfigError: nobody has said what this kind's draft KV is made with.
    """

    def __init__(self, arm: str, drafter: nn.Module) -> None:
        check_kind(arm, drafter)
        self._rows: list[tuple[Tensor, Tensor, int]] = []
        for name, parameter in drafter.named_parameters():
            first = first_frozen_row(drafter, name)
            if first is None:
                continue
            self._rows.append((parameter, parameter.detach()[first:].clone(), first))
            if first == 0:
                parameter.requires_grad_(False)
            else:
                parameter.register_hook(_without(first))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def write_back(self) -> None:
        """What an optimiser may have done to them (weight decay, rounding) is undone."""
        for parameter, rows, first in self._rows:
            parameter[first:] = rows


def stored_dtype(checkpoint: Path) -> torch.dtype:
    """In which a drafter's file holds its weights: what is held must be written as it was read."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if FUSION in set(file.keys()):
                found: torch.dtype = file.get_tensor(FUSION).dtype
                return found
    raise CheckpointError(
        f"{checkpoint} holds no {FUSION}: it is not a drafter whose training can be continued"
    )


def _without(first: int) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[first:] = 0
        return kept

    return hook
