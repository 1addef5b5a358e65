"""Every op inside a CUDA graph: no host synchronisation, static shapes, new inputs at replay.

On a CPU a call takes the replay's place, which shows that an op reads its arguments at each call.
"""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import whiflash_kernels
from kernel_backends import DEVICE

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from cases import KERNELS, Bench, Case, CaseSizes, catch_up_cases
from shapes import SHAPES

SMALL = replace(
    SHAPES["smollm2-135m"],
    vocab=9_001,
    hidden=64,
    intermediate=96,
    captured=3,
    dflash_chunks=(0, 2),
    eagle3_chunks=(0, 1, 2),
    router_units=24,
    dtype=torch.float32,
)
OPS = [name for name in whiflash_kernels.__all__ if not isinstance(getattr(whiflash_kernels, name), type)]


def cases(seed: int) -> dict[str, Case]:
    """The first case of each op. Seeds differ in numbers, not in sizes."""
    bench = Bench(SMALL, DEVICE, 6, CaseSizes((6,), (3,), (5,), 131))
    assert bench.generator is not None
    bench.generator.manual_seed(seed)
    bench.text.copy_(bench.below(SMALL.vocab, *bench.text.shape))
    found: dict[str, Case] = {}
    for family in (*KERNELS, catch_up_cases):
        for case in family(bench):
            found.setdefault(case.op, case)
    return found


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of a call's arguments, or of what it returned, in one order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, partial):
        yield from tensors([value.args, value.keywords])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
    elif is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in fields(value)])


@pytest.mark.parametrize("op", OPS)
def test_replays_equal_eager_runs(op: str) -> None:
    first = cases(0)[op].call

    def refill(seed: int) -> None:
        for into, value in zip(tensors(first), tensors(cases(seed)[op].call), strict=True):
            into.copy_(value)

    run = first
    if DEVICE.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            first()  # compiles the kernels, picks cuBLAS's algorithms and builds the pools' address table
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = first()

        def run() -> Any:
            graph.replay()
            torch.cuda.synchronize()
            return kept

    for seed in (1, 2, 3):
        refill(seed)
        replayed = [value.clone() for value in tensors([run(), first])]
        eager = cases(seed)[op].call
        assert replayed
        for found, expected in zip(replayed, tensors([eager(), eager]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
