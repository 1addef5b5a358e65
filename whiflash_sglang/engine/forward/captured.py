"""Capture the outputs of a loaded target's layers, in serving and for training data.

Whether a class of SGLang's models lets its layers' outputs be captured is read from its source, since a launch needs it
when it reads its arguments, and importing the class takes seconds.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

from whiflash_sglang.checkpoints.fit import TargetShape
from whiflash_sglang.engine.forward import parallel
from whiflash_sglang.errors import CheckpointError
from whiflash_sglang.formats.choice import SharedVocabulary

SETTERS = ("set_dflash_layers_to_capture", "set_eagle3_layers_to_capture", "set_dspark_layers_to_capture")
"""Methods that set the layers to capture, in the order in which a loaded model is asked for them."""
_DSPARK_ALONE = ("KimiLinearForCausalLM",)
"""Classes that capture layers' outputs and have only the last of `SETTERS`. DeepSeek-V4's has it and captures none."""


def may_capture(architecture: str) -> bool:
    """Whether an architecture's class has a method that sets layers to capture, its own or inherited. A class from
    outside SGLang is known only once its model is loaded, so it counts as having one."""
    return _has_setter(architecture) is not False


def _has_setter(name: str) -> bool | None:
    """Whether a class has a method of `SETTERS`, its own or inherited; None if it is not among SGLang's models."""
    if name not in _classes():
        return None
    bases, body = _classes()[name]
    # MiniCPM-V's classes pass these calls on to another class, which they choose by version.
    setters = SETTERS if name in _DSPARK_ALONE else (*SETTERS[:2], "__getattr__")
    if any(f"def {setter}(" in body for setter in setters):
        return True
    return any(_has_setter(base) for base in re.findall(r"\w+", bases) if base != name)


@cache
def _classes() -> dict[str, tuple[str, str]]:
    """Return bases and body of every class in the modules of SGLang's models, by its name."""
    classes: dict[str, tuple[str, str]] = {}
    for file in (Path(str(files("sglang"))) / "srt" / "models").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for one in re.finditer(r"^class (\w+)(?:\(([^)]*)\))?:\n((?:[ \t].*\n|\n)*)", text, re.MULTILINE):
            classes[one[1]] = one[2] or "", one[3]
    return classes


class Captured:
    """Captures outputs of some layers and the state after the final norm, in forwards that ask for hidden states.

    Attributes:
        read: number of states of a row that drafters read. vectors: number of states of a row that are kept. mode:
            SGLang's mode of a forward that keeps them.
    """

    def __init__(self, model: Any, num_layers: int, layers: Sequence[int], *, keeps_final: bool) -> None:
        """Set the layers once, as a union: upstream's setters write one list, and a second call would overwrite it.

        Args:
            model: SGLang's. layers: ascending; `num_layers` means the state after the final norm, which is then
                the last of the features. keeps_final: that state is kept beside the features.

        Raises:
            CheckpointError: the model cannot capture its layers' outputs.
        """
        self._layers = [layer for layer in layers if layer < num_layers]
        self.read, self._joins_final = len(layers), len(self._layers) < len(layers)
        if self._layers:
            _set_layers(model, self._layers)
        if self._layers and (keeps_final or self._joins_final):
            language_model(model).logits_processor.keep_last_hidden_states = True
        self.vectors = self.read + (keeps_final and not self._joins_final)
        self.mode = CaptureHiddenMode.FULL if self.vectors else CaptureHiddenMode.NULL

    def take(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the `states` of a forward and remove them from SGLang's record."""
        states = self.states(output)
        output.hidden_states = output.last_hidden_states = None
        return states

    def states(self, output: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features [T, F] and final states [T, H] of a forward. F is 0 if no drafter reads any."""
        features: Any = output.hidden_states
        final: Any = output.last_hidden_states
        if not self.read:
            logits = output.next_token_logits
            return logits.new_empty((len(logits), 0)), features
        if not self._layers:
            # Without a layer to capture SGLang keeps what its head reads.
            return features, features
        return torch.cat([features, final], -1) if self._joins_final else features, final


def language_model(model: Any) -> Any:
    """Return the part of SGLang's `model` that has the head: the model itself, or its part beside an image tower."""
    while not hasattr(model, "logits_processor") and hasattr(model, "language_model"):
        model = model.language_model
    return model


def _set_layers(model: Any, layers: list[int]) -> None:
    for name in SETTERS:
        # Qwen3-VL passes the first setter on to its text model, which has only the second.
        if hasattr(model, name):
            with suppress(AttributeError):
                getattr(model, name)(layers)
                return
    raise CheckpointError(f"{type(model).__name__} has no hidden-state capture in SGLang, so no drafter can read it")


class LoadedTarget:
    """The target that a worker of SGLang's serves."""

    def __init__(self, target_worker: Any) -> None:
        self.worker = target_worker
        self.runner = target_worker.model_runner
        self.model = self.runner.model
        self._text = language_model(self.model)
        self.shape = TargetShape.of(target_worker.model_config)
        self.dtype: torch.dtype = self.runner.dtype
        self.device = torch.device(self.runner.device)

    @property
    def shared(self) -> SharedVocabulary | None:
        """Return the vocabulary if it is split over processes or quantised, else None."""
        return parallel.shared_vocabulary(self._text, self.shape.vocab_size)

    @property
    def embedding(self) -> torch.Tensor:
        """Return the [V, H] input embedding without padding rows: this process's if split, no rows if quantised."""
        return self._matrix("input embedding", parallel.input_embedding(self._text))

    @property
    def embedding_scale(self) -> float:
        """Return the factor for rows of `embedding` before the first layer; rows of `shared` are scaled already."""
        return 1.0 if self.shared and self.shared.embed else self.row_scale

    @property
    def row_scale(self) -> float:
        """Return the factor by which the embedding's own module multiplies its rows (Gemma)."""
        return float(getattr(parallel.input_embedding(self._text), "embed_scale", 1.0))

    @cached_property
    def lm_head(self) -> torch.Tensor:
        """Return the [V, H] output projection, split like `embedding`; whole if ranks with DP attention share it."""
        head = parallel.output_head(self._text)
        if parallel.is_shared_with_peers(head):
            return parallel.whole_head(head, self.shape.vocab_size)
        return self._matrix("output head", head)

    def gather_head(self) -> None:
        """Copy all ranks' current parts of the head into `lm_head` if they share one. All must call it together."""
        head = parallel.output_head(self._text)
        if "lm_head" in vars(self) and parallel.is_shared_with_peers(head):
            self.lm_head.copy_(parallel.whole_head(head, self.shape.vocab_size))

    def _matrix(self, what: str, module: Any) -> torch.Tensor:
        """Return the vocabulary's rows of a module's weight. Raises CheckpointError if it is no plain matrix, though
        SGLang reads it without quantisation."""
        hidden_size = self.shape.hidden_size
        if parallel.is_quantised(module):
            return torch.empty(0, hidden_size, dtype=self.dtype, device=self.device)
        weight: torch.Tensor = module.weight
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.shape[1] != hidden_size:
            raise CheckpointError(
                f"the target's {what} is {weight.dtype} {list(weight.shape)}, no matrix of 16 or 32 bits over "
                f"{hidden_size}; use another checkpoint"
            )
        rows = parallel.rows_here(module, self.shape.vocab_size)
        # Without padding it is the weight itself: a packed copy stays with the tensor object, so drafters share it.
        return weight if rows == len(weight) else weight[:rows]
