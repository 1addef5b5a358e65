"""Propose copies on a CPU, in `copies.cpp`: it is compiled at its first use."""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from whiflash_kernels.copies import check
from whiflash_kernels.cpu import compiler
from whiflash_kernels.structs import Drafts

_SOURCE = Path(__file__).with_name("copies.cpp")
_FUNCTIONS = "propose:vplppppppplllflpppppp"


def propose(
    library: ctypes.CDLL,
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

    The compiled `library` reads a text from its end until it has eight places; the reference compares every place.
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
    library.whiflash_propose(
        tokens.data_ptr(),
        tokens.stride(0),
        *(each.data_ptr() for each in arrays),
        *numbers,
        None if before is None else before.data_ptr(),
        *(each.data_ptr() for each in results),
    )
    return Drafts(out, counts, alives, matched=matched, agreements=agreements)


@cache
def compiled_copies(directory: Path) -> Callable[..., Drafts]:
    """Return `propose` with its library, compiled into `directory` or loaded from there.

    Raises:
        OSError: it cannot be compiled or loaded.
    """
    # Products and sums are not fused, so that results are the same on every machine.
    return partial(propose, compiler.load(_SOURCE, directory, ["-ffp-contract=off"], _FUNCTIONS))
