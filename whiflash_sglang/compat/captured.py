"""What a loaded target's forwards give of its layers: one capture, in serving and where training data are made."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from whiflash_sglang.compat.capture import SETTERS
from whiflash_sglang.errors import CheckpointError


class Captured:
    """Outputs of some layers, and the state behind the final norm, of every forward that asks for hidden states.

    Attributes:
        vectors: how many states of a row are kept.
    """

    def __init__(self, model: Any, num_layers: int, layers: Sequence[int], *, keeps_final: bool) -> None:
        """Upstream's setters write one list and the second would overwrite the first, so the union is set once.

        Args:
            model: SGLang's. layers: ascending; `num_layers` stands for the state behind the final norm, which is then
                the last of the features. keeps_final: that state is kept beside the features.

        Raises:
            CheckpointError: the model cannot capture what its layers put out.
        """
        self._layers = [layer for layer in layers if layer < num_layers]
        self._joins_final = len(self._layers) < len(layers)
        if self._layers:
            _set_layers(model, self._layers)
        if self._layers and (keeps_final or self._joins_final):
            language_model(model).logits_processor.keep_last_hidden_states = True
        self.vectors = len(layers) + (keeps_final and not self._joins_final)

    def take(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`states` of a forward, which SGLang's record then has no longer."""
        found = self.states(output)
        output.hidden_states = output.last_hidden_states = None
        return found

    def states(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features [T, F] and final states [T, H] of a forward."""
        features, final = output.hidden_states, output.last_hidden_states
        if not self._layers:
            # Without a layer to capture SGLang keeps what its head reads.
            return features, features
        return torch.cat([features, final], -1) if self._joins_final else features, final


def language_model(model: Any) -> Any:
    """The part of SGLang's `model` that has the head: the model itself, or what it holds beside a tower for images."""
    while not hasattr(model, "logits_processor") and hasattr(model, "language_model"):
        model = model.language_model
    return model


def _set_layers(model: Any, layers: list[int]) -> None:
    for name in SETTERS:
        # Qwen3-VL's hands on the first to its text model, which has the other one alone.
        if hasattr(model, name):
            with suppress(AttributeError):
                getattr(model, name)(layers)
                return
    raise CheckpointError(
        f"{type(model).__name__} has no hidden-state capture in SGLang, so no drafter can read it"
    )
