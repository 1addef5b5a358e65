"""The target while data is made: it answers prompts, and tells the features of texts that are there."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from whiflash_sglang.train.answers.generate import Answer
from whiflash_sglang.train.answers.prompts import PromptRow
from whiflash_sglang.train.config import Data


class Answering(Protocol):
    """A generator of answers."""

    def run(
        self, prompts: Iterator[PromptRow], on_skip: Callable[[PromptRow, str], None]
    ) -> Iterator[Answer]:
        """Answers as they finish; prompts that have none are reported to `on_skip`."""
        ...


class Teacher(Protocol):
    """A `LoadedTarget`, which this package runs, or a `ServedTarget`, which SGLang does.

    Attributes:
        capture: layers whose outputs are the features, ascending.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def template(self) -> str | None: ...
    @property
    def capture(self) -> list[int]: ...
    @property
    def hidden_size(self) -> int: ...

    def generator(self, settings: Data, *, seed: int, keep_loops: bool) -> Answering:
        """What answers prompts by `settings`."""
        ...

    def states(self, texts: Iterable[tuple[int, list[int]]]) -> Iterator[tuple[int, Tensor]]:
        """Features and final states [T, captured + 1, H] of texts, with their keys, in any order."""
        ...

    def close(self) -> None:
        """Give up what it holds."""
        ...
