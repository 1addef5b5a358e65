"""The search for copies on the host, compiled at its first use; `copies.cpp` says what it computes."""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from whiflash_kernels.cpu import compiler

_SOURCE = Path(__file__).with_name("copies.cpp")


class CompiledCopies:
    """Calls the compiled search. There is one per process and directory (`compiled_copies`), for one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        self._link, self._copy = library.whiflash_link, library.whiflash_copy
        self._link.argtypes, self._link.restype = (pointer, long), None
        self._copy.argtypes = (
            [pointer] * 2 + [long] * 4 + [pointer] * 2 + [number] * 3 + [long] + [pointer] * 4
        )
        self._copy.restype = long
        self._place = array("q", [0, 0])
        self._room(64)

    def _room(self, most: int) -> None:
        self._most = most
        self._tokens, self._agreements = array("i", [0]) * most, array("i", [0]) * most
        self._alive = array("d", [0.0]) * most
        results = self._place, self._tokens, self._alive, self._agreements
        self._results = [each.buffer_info()[0] for each in results]

    def link(self, text: "array[int]", start: int) -> None:
        """Enter tokens from `start` on into a text's chains and tables.

        Args:
            text: its `Text`, as eight numbers of 64 bits.
        """
        self._link(text.buffer_info()[0], start)

    def copy(
        self,
        text: "array[int]",
        drafts: Sequence[int],
        copied_from: int,
        least: int,
        most: int,
        observed: tuple[int, int],
        chances: tuple[float, float, float, int],
    ) -> tuple[list[int], list[float], list[int], int, int]:
        """Return a copy's tokens, chances, agreements, match length and source. Without tokens no place matches.

        Args:
            text: as of `link`. observed: addresses of `right` and `seen`. chances: the factor on the first one, the
                least that is worth a token, and that of all before the copy; tokens that are `paid`. The rest as of
                `whiflash_copy`.
        """
        if most > self._most:
            self._room(most)
        fields, ids = text.buffer_info()[0], array("i", drafts)
        count = self._copy(
            fields, *ids.buffer_info(), copied_from, least, most, *observed, *chances, *self._results
        )
        length, source = self._place
        parts = self._tokens[:count].tolist(), self._alive[:count].tolist(), self._agreements[:count].tolist()
        return *parts, length, source


@cache
def compiled_copies(directory: Path) -> CompiledCopies:
    """Compile the functions into `directory`, or load them from there.

    Raises:
        OSError: they cannot be compiled or loaded.
    """
    # Products and sums are not fused, so that results are the same as Python's.
    return CompiledCopies(compiler.load(_SOURCE, directory, ["-ffp-contract=off"]))
