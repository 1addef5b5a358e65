"""Search texts for drafts to copy, on a CPU, in `copies.cpp`: it is compiled at its first use."""

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from whiflash_kernels.copies import check
from whiflash_kernels.cpu import compiler
from whiflash_kernels.structs import Drafts

_SOURCE = Path(__file__).with_name("copies.cpp")
_FUNCTIONS = (
    "text:p text_end:vp extend:vppl tokens:vpp bytes:lp follow:vppl copy:lplplplllddlpppp propose:vplppppppplllflpppppp"
)


class CompiledCopies:
    """Calls the compiled search. A process has one for each directory (`compiled_copies`). `copy` is for one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self._follow = library, library.whiflash_follow
        self._copy, self._propose = library.whiflash_copy, library.whiflash_propose
        self._place = array("q", [0, 0, 0])
        self._room(64)

    def _room(self, most: int) -> None:
        self._most = most
        self._tokens, self._agreements = array("i", [0]) * most, array("i", [0]) * most
        self._alive = array("d", [0.0]) * most
        results = self._place, self._tokens, self._alive, self._agreements
        self._results = [each.buffer_info()[0] for each in results]

    def text(self) -> compiler.Native:
        """Return a new `Text`."""
        return compiler.Native(self._library, "text")

    def follow(self, followed: "array[int]", tokens: Sequence[int]) -> None:
        """Compare a predicted output with the answer's next tokens, and find the answer's present place in it.

        Args:
            followed: its `Followed`, as eight numbers of 64 bits.
        """
        ids = array("i", tokens)
        self._follow(followed.buffer_info()[0], *ids.buffer_info())

    def copy(
        self,
        sources: "array[int]",
        drafts: Sequence[int],
        stops: "array[int]",
        least: int,
        most: int,
        chances: tuple[float, float, int],
    ) -> tuple[list[int], list[float], list[int], int, int, int]:
        """Return the best copy: its tokens, for each the chance of acceptance and the agreement of the matching places,
        the length and place of its match, and the number of its source. Without tokens no place matches.

        Args:
            sources: `Source`s, as seven numbers of 64 bits each. stops: int32. chances: the least that is worth a row,
                that of all drafts before, and how many tokens are copied at any chance. The rest: see `whiflash_copy`.
        """
        if most > self._most:
            self._room(most)
        address, numbers = sources.buffer_info()
        ids = array("i", drafts)
        count = self._copy(
            address, numbers // 7, *ids.buffer_info(), *stops.buffer_info(), least, most, *chances, *self._results
        )
        parts = self._tokens[:count].tolist(), self._alive[:count].tolist(), self._agreements[:count].tolist()
        length, source, number = self._place
        return *parts, length, source, number

    def propose(
        self,
        tokens: Tensor,
        request_slots: Tensor,
        seq_lens: Tensor,
        back: Tensor,
        limits: Tensor,
        factors: Tensor,
        chances: Tensor,
        boundaries: Tensor,
        *,
        width: int,
        worth: float,
        min_match: int = 1,
        behind: tuple[Tensor, Tensor] | None = None,
    ) -> Drafts:
        """Propose copies as `whiflash_kernels.propose_copies` does, with its arguments, for tensors of a CPU.

        It reads a text from its end until it has eight places; the torch reference compares every place.
        """
        check(tokens, request_slots, chances, boundaries, width=width)
        sizes, limits, before = seq_lens.long() + 1, limits.long(), None
        if behind is not None:
            drafted, alive = behind
            sizes = sizes + drafted
            limits = torch.where(drafted > 0, limits - drafted, 0)
            before = alive.gather(1, (drafted - 1).clamp(min=0)[:, None])
        size, slots = len(sizes), request_slots.long()
        shape = (size, width)
        out, counts, alives = sizes.new_zeros(shape), sizes.new_zeros(size), chances.new_zeros(shape)
        agreements, matched = boundaries.new_zeros(shape), sizes.new_zeros(size)
        arrays = slots, sizes, back, limits.contiguous(), factors.contiguous(), chances, boundaries
        numbers = len(boundaries), size, width, worth, min_match
        results = out, counts, alives, agreements, matched
        self._propose(
            tokens.data_ptr(),
            tokens.stride(0),
            *(each.data_ptr() for each in arrays),
            *numbers,
            None if before is None else before.data_ptr(),
            *(each.data_ptr() for each in results),
        )
        return Drafts(out, counts, alives, matched=matched, agreements=agreements)


@cache
def compiled_copies(directory: Path) -> CompiledCopies:
    """Compile the functions into `directory`, or load them from there.

    Raises:
        OSError: they cannot be compiled or loaded.
    """
    # Products and sums are not fused, so that results are the same on every machine.
    return CompiledCopies(compiler.load(_SOURCE, directory, ["-ffp-contract=off"], _FUNCTIONS))
