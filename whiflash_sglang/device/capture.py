"""Passes that are captured for a few sizes and replayed for whatever fits. Imports no SGLang.

A pass is a function of tensors that reads no value of them on the host. Captured, it reads its inputs where they were
when it was captured, so they have a place of their own: the live ones are copied there, and what a size has more is
padding. A :class:`Recorder` captures: CUDA graphs on a GPU (`compat/forward/graphs.py`), a tape of operators in tests,
and none on a CPU, where every pass runs as it is written. The pass is the same function for all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch

from whiflash_sglang.errors import ConfigError

T = TypeVar("T")

MOST_DRAFTS = 1024
"""Drafts of a batch that are verified at once where the host may not count them: the likeliest of all. A card computes
by then, and memory for more rows would be kept from KV."""


class Recorder(Protocol):
    """Captures what functions issue."""

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """A function that replays all of `body`, and the result of `body`, which every replay overwrites.

        `body` may run more than once before. Raises RuntimeError where it cannot be captured.
        """
        ...


def doubling(first: int, most: int) -> list[int]:
    """Sizes of graphs: `first`, twice that, and so on below `most`, and `most`."""
    sizes = []
    while first < most:
        sizes.append(first)
        first *= 2
    return [*sizes, most]


def graded(most: int) -> list[int]:
    """Sizes of graphs, ascending: two a doubling up to 16, then four, and `most`."""
    sizes, doubled = [1, 2, 3, 4, 6, 8, 12], 16
    while doubled < most:
        sizes += range(doubled, 2 * doubled, doubled // 4)
        doubled *= 2
    return [*(size for size in sizes if size < most), most]


@dataclass(frozen=True, slots=True)
class StaticInput:
    """A tensor at a fixed place, its first dimension requests. padding: those of requests that are none, as large as
    the tensor; None: whatever.
    """

    tensor: torch.Tensor
    padding: torch.Tensor | None = None

    def copies(self, live: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Where to copy what, so that its first requests are those of `live`, the others padding."""
        count = len(live)
        copies = [(self.tensor[:count], live)]
        if self.padding is not None and count < len(self.tensor):
            copies.append((self.tensor[count:], self.padding[count:]))
        return copies


def load(inputs: Sequence[StaticInput], live: Sequence[torch.Tensor]) -> None:
    """Load each of `inputs` with its own of `live`: one launch for all that are whole words of 64 bits, whatever their
    kind, and one for every kind of the others.
    """
    by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for each, values in zip(inputs, live, strict=True):
        for target, source in each.copies(values):
            if target.numel():
                if target.dtype == source.dtype and _has_words(target) and _has_words(source):
                    target, source = target.view(torch.int64), source.view(torch.int64)
                by_dtype.setdefault(target.dtype, []).append((target, source))
    for copies in by_dtype.values():
        targets, sources = zip(*copies, strict=True)
        torch._foreach_copy_(targets, sources)


def _has_words(tensor: torch.Tensor) -> bool:
    """Whether a row of a tensor is a number of words of 64 bits, at a place for such."""
    row, begin = tensor.shape[-1] * tensor.itemsize, tensor.storage_offset() * tensor.itemsize
    return bool(row % 8 == 0 and begin % 8 == 0 and tensor.is_contiguous())


class CapturedPass(Generic[T]):
    """One pass, captured for every one of `sizes`.

    Args:
        name: says what it is where it cannot be captured.
        body: the pass at a size, over the static inputs.
        inputs: static; several passes may share them where one is done before the next is loaded.
        sizes: what the pass is captured for, ascending.

    Raises:
        ConfigError: it cannot be captured.
    """

    def __init__(
        self,
        name: str,
        body: Callable[[int], T],
        inputs: Sequence[StaticInput],
        sizes: Sequence[int],
        recorder: Recorder,
    ) -> None:
        self.name = name
        self.sizes = list(sizes)
        self._inputs = inputs
        self._captured: dict[int, tuple[Callable[[], None], T]] = {}
        for each in inputs:
            if each.padding is not None:
                each.tensor.copy_(each.padding)
        for size in reversed(
            self.sizes
        ):  # the largest first: the others find room in the memory that it leaves
            try:
                self._captured[size] = recorder.record(partial(body, size))
            except RuntimeError as error:
                raise ConfigError(
                    f"{name} cannot be captured for a size of {size}; --disable-cuda-graph serves without graphs: "
                    f"{error}"
                ) from error

    def holds(self, requests: int, size: int) -> bool:
        """Whether something that was captured is large enough."""
        return size <= self.sizes[-1] and requests <= len(self._inputs[0].tensor)

    def replay(self, size: int, *live: torch.Tensor) -> T:
        """The smallest that holds `size`, for the requests whose inputs are `live`.

        What it returns is as large as what was captured, and good until the next replay.
        """
        chosen = next(captured for captured in self.sizes if captured >= size)
        again, result = self._captured[chosen]
        load(self._inputs, live)
        again()
        return result
