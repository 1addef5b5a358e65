"""Surroundings of the ops in a test: the device, the implementations, and guarded outputs."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

BACKENDS = ["torch", "triton"] if DEVICE.type == "cuda" or INTERPRETING else ["torch"]
"""On a CPU, Triton runs only in the child process that `test_interpreter.py` starts with TRITON_INTERPRET=1."""

GUARD = 64


def integers(values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """On the device."""
    return torch.as_tensor(values, dtype=dtype).to(DEVICE)


def examples(number: int) -> int:
    """Examples of a hypothesis test: fewer under the interpreter (milliseconds a program), but for evidence."""
    return number if not INTERPRETING or os.environ.get("WHIFLASH_ALL_EXAMPLES") else max(number // 5, 6)


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Force one implementation.

    The interpreter runs the programs of a launch one after the other. Here the last one comes first: what follows from
    their order would be a race on a GPU.
    """
    with mock.patch.dict(os.environ, {"WHIFLASH_KERNELS": backend}):
        if backend != "triton" or not INTERPRETING:
            yield
            return
        from triton.runtime.interpreter import interpreter_builder as builder

        place = builder.set_grid_idx

        def backwards(*program: int) -> None:
            place(*(count - 1 - index for count, index in zip(builder.grid_dim, program, strict=True)))

        with mock.patch.object(builder, "set_grid_idx", backwards):
            yield


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Every tensor that an op allocates starts full of sentinels and is between two guards of them.

    An element left unwritten then fails the comparison with the oracle, and a write outside its tensor fails
    here, when the guards are looked at.
    """
    buffers = []
    empty = torch.empty

    def poisoned(*size, dtype=None, device=None):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count = math.prod(shape)
        dtype = dtype or torch.get_default_dtype()
        sentinel = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        buffer = torch.full((count + 2 * GUARD,), sentinel, dtype=dtype, device=device)
        buffers.append((buffer, count, sentinel))
        return buffer[GUARD : GUARD + count].view(shape)

    with mock.patch.object(torch, "empty", poisoned):
        yield
    assert empty is torch.empty
    for buffer, count, sentinel in buffers:
        guards = torch.cat([buffer[:GUARD], buffer[GUARD + count :]])
        untouched = guards.isnan() if isinstance(sentinel, float) else guards == sentinel
        assert untouched.all(), f"a write landed outside an output of {count} elements"


@contextmanager
def watched_merges() -> Iterator[list[tuple[list[tuple[int, ...]], torch.Tensor]]]:
    """Arguments of merging launches: (request, its first place, its shares) of all that were cut, and the sums."""
    from whiflash_kernels.triton_kernels import shares

    found: list[tuple[list[tuple[int, ...]], torch.Tensor]] = []
    kernel = shares._merge_shares_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(
                partial: torch.Tensor, peaks: torch.Tensor, merges: torch.Tensor, *rest: Any, **options: Any
            ) -> None:
                count, *listed = merges.tolist()
                found.append(([tuple(listed[3 * i : 3 * i + 3]) for i in range(count)], partial.clone()))
                kernel[grid](partial, peaks, merges, *rest, **options)

            return launch

    with mock.patch.object(shares, "_merge_shares_kernel", Watched()):
        yield found
