"""Passes that are captured for a few sizes and replayed for whatever fits. Imports no SGLang.

A pass is a function of tensors that reads no value of them on the host. Captured, it reads its inputs where they were
when it was captured, so they have a place of their own: the kernel that makes them writes them there, with padding
behind, where a size has more. A :class:`Recorder` captures: CUDA graphs on a GPU (`engine/forward/graphs.py`), a tape
of operators in tests, and none on a CPU, where every pass runs as it is written. The pass is the same function for all
of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

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


class CapturedPass(Generic[T]):
    """One pass, captured for every one of `sizes`.

    Args:
        name: says what it is where it cannot be captured.
        body: the pass at a size, over inputs at a place of their own, which hold padding.
        sizes: what the pass is captured for, ascending.

    Raises:
        ConfigError: it cannot be captured.
    """

    def __init__(self, name: str, body: Callable[[int], T], sizes: Sequence[int], recorder: Recorder) -> None:
        self.name = name
        self.sizes = list(sizes)
        self._captured: dict[int, tuple[Callable[[], None], T]] = {}
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

    def size_for(self, size: int) -> int | None:
        """The smallest that holds `size`; None where nothing that was captured does."""
        return next((captured for captured in self.sizes if captured >= size), None)

    def replay(self, size: int) -> T:
        """The smallest that holds `size`, which one does.

        Its result is as large as what was captured, and good until the next replay.
        """
        chosen = self.size_for(size)
        assert chosen is not None
        again, result = self._captured[chosen]
        again()
        return result
