"""Passes that are captured for a few sizes and replayed for every batch that fits. Imports no SGLang.

A pass is a function of tensors that reads no value of them on the host. A captured pass reads its inputs at the
addresses of the capture, so they have fixed buffers: the kernel that makes the inputs writes them there, and pads them
up to the captured size. A :class:`Recorder` captures: CUDA graphs on a GPU (`engine/forward/graphs.py`), a tape of
operators in tests. On a CPU nothing is captured, and every pass runs as it is written. All of them share one function.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from whiflash_sglang.errors import ConfigError

T = TypeVar("T")

MOST_DRAFTS = 1024
"""Most drafts of a batch that are verified at once: the likeliest ones. A GPU is compute-bound at that size, and memory
for more rows would be taken from KV."""


class Recorder(Protocol):
    """Captures the device work that a function issues."""

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Capture `body`: return a function that replays it, and its result, which every replay overwrites.

        `body` may run more than once first. Raises RuntimeError where it cannot be captured.
        """
        ...


def doubling(first: int, most: int) -> list[int]:
    """Return sizes of graphs: `first` doubled again and again as long as it is below `most`, then `most`."""
    sizes = []
    while first < most:
        sizes.append(first)
        first *= 2
    return [*sizes, most]


def graded(most: int) -> list[int]:
    """Return sizes of graphs, ascending to `most`: two in each doubling up to 16, four in each one above."""
    sizes, doubled = [1, 2, 3, 4, 6, 8, 12], 16
    while doubled < most:
        sizes += range(doubled, 2 * doubled, doubled // 4)
        doubled *= 2
    return [*(size for size in sizes if size < most), most]


class CapturedPass(Generic[T]):
    """One pass, captured for each of `sizes`.

    Args:
        name: of the pass, for the error if it cannot be captured.
        body: the pass at a size, over fixed input buffers, which hold padding during the capture.
        sizes: that the pass is captured for, ascending.

    Raises:
        ConfigError: the pass cannot be captured.
    """

    def __init__(self, name: str, body: Callable[[int], T], sizes: Sequence[int], recorder: Recorder) -> None:
        self.name = name
        self.sizes = list(sizes)
        self._captured: dict[int, tuple[Callable[[], None], T]] = {}
        for size in reversed(self.sizes):  # the largest first: the others find room in the memory that it leaves
            try:
                self._captured[size] = recorder.record(partial(body, size))
            except RuntimeError as error:
                raise ConfigError(
                    f"{name} cannot be captured for a size of {size}; --disable-cuda-graph serves without graphs: "
                    f"{error}"
                ) from error

    def size_for(self, size: int) -> int | None:
        """Return the smallest captured size of at least `size`; None if all are smaller."""
        return next((captured for captured in self.sizes if captured >= size), None)

    def replay(self, size: int) -> T:
        """Replay the smallest captured size of at least `size`, which must exist, and return its result.

        The result has the captured size and is valid until the next replay.
        """
        chosen = self.size_for(size)
        assert chosen is not None
        again, result = self._captured[chosen]
        again()
        return result
