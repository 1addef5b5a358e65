"""Count the bytes that programs of our kernels move, under Triton's interpreter, beside those that an op must move.

    python kernels/bench/moved_bytes.py                        # Qwen3-8B's shapes; no GPU, some minutes
    python kernels/bench/moved_bytes.py --only draft_attention

Every load and store counts its distinct sectors of 32 bytes, the least that a card moves. Caches are left out: what two
programs read counts twice. The minimum is the bench's: every input read once, every result written once.
"""

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "WHIFLASH_KERNELS": "triton"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from cases import KERNELS, Bench, Case, Sizes
from shapes import SHAPES

SECTOR = 32


@dataclass
class Traffic:
    """Bytes that each program of some launches moved, by (launch, its three numbers)."""

    by_program: dict[tuple[int, ...], int] = field(default_factory=lambda: defaultdict(int))

    @property
    def moved(self) -> int:
        """By all programs together."""
        return sum(self.by_program.values())

    @property
    def most(self) -> int:
        """By the program that moved most: its launch cannot end before."""
        return max(self.by_program.values(), default=0)


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Inside, what interpreted launches move is added up.

    Raises:
        RuntimeError: the interpreter was not chosen before Triton was imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "TRITON_INTERPRET is not 1, and only interpreted programs can be counted: set it before the start"
        )
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    builder, found, launch = interpreter_builder, Traffic(), 0
    load, store, call = (
        builder.create_masked_load,
        builder.create_masked_store,
        InterpretedFunction.__getitem__,
    )

    def note(pointers: Any, mask: Any) -> None:
        sectors = np.unique(pointers.data[mask.data.astype(bool)].astype(np.int64) // SECTOR)
        found.by_program[(launch, *builder.grid_idx)] += SECTOR * sectors.size

    def noted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask)
        return load(pointers, mask, *rest)

    def noted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask)
        return store(pointers, value, mask, *rest)

    def noted_call(kernel: Any, grid: Any) -> Callable[..., Any]:
        nonlocal launch
        launch += 1
        run: Callable[..., Any] = call(kernel, grid)
        return run

    with (
        mock.patch.object(builder, "create_masked_load", noted_load),
        mock.patch.object(builder, "create_masked_store", noted_store),
        mock.patch.object(InterpretedFunction, "__getitem__", noted_call),
    ):
        yield found


def counted(bench: Bench, only: str | None = None) -> Iterator[tuple[Case, Traffic]]:
    """Cases of the bench that launch kernels of ours and no product of a library, and what they moved."""
    for case in (case for family in KERNELS for case in family(bench)):
        if only in (None, case.op):
            with counted_traffic() as found:
                case.call()
            yield case, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--only", help="cases of this op alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(SHAPES[arguments.shape], torch.device("cpu"), 8, Sizes(batches=(2, 8)))
    print(
        "| op | case | programs | moved, KB | of the minimum | most of one, KB |\n|---|---|---:|---:|---:|---:|"
    )
    for case, found in counted(bench, arguments.only):
        sizes = f"{found.moved / 1e3:.0f} | {found.moved / case.moved_bytes:.2f} | {found.most / 1e3:.1f}"
        print(f"| {case.op} | {case.label} | {len(found.by_program)} | {sizes} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
