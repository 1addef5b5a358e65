"""Compiled bfloat16 products for processors with AVX2 and without bfloat16 instructions.

There torch takes 4 to 7 times as long as for float32, and a verification of twelve rows eleven times as long as a step
of one. `products.cpp` says what is computed and how.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.cpu import compiler

_SOURCE = Path(__file__).with_name("products.cpp")
_PROFILED = compiler.profiled("product")


@dataclass(frozen=True, slots=True)
class CompiledProducts:
    """Calls the compiled kernel. There is one per process and directory (:func:`compiled_products`)."""

    library: ctypes.CDLL

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `torch.nn.functional.linear` for bfloat16 on a CPU.

        Numerics: sums in float32 in an order that depends on K alone, rounded once.

        Args:
            x: [..., K]. weight: [N, K], contiguous. bias: [N], contiguous.

        Returns:
            [..., N] bfloat16, a new tensor.

        Raises:
            ValueError: shapes that do not fit each other; the kernel would read beyond them.
        """
        columns, size = weight.shape
        if x.shape[-1] != size or (bias is not None and bias.shape != (columns,)):
            beside = "" if bias is None else f" and bias {tuple(bias.shape)}"
            raise ValueError(f"x {tuple(x.shape)}{beside} do not fit weight {tuple(weight.shape)}")
        rows = x.reshape(-1, size)
        if rows.stride(1) != 1 and size > 1:
            rows = rows.contiguous()
        out = x.new_empty(*x.shape[:-1], columns)
        with _PROFILED:
            self.library.whiflash_product(
                rows.data_ptr(),
                rows.stride(0),
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                out.data_ptr(),
                rows.shape[0],
                columns,
                size,
            )
        return out


@cache
def compiled_products(directory: Path) -> CompiledProducts:
    """Compile the kernel into `directory`, or load it from there, and check that it agrees with torch.

    Raises:
        OSError: it cannot be compiled or loaded, does not share torch's threads, or computes something else.
    """
    library = compiler.load(_SOURCE, directory, ["-fopenmp"], "product:vplpppiii")
    return compiler.checked(library, CompiledProducts(library), _agrees)


def _agrees(products: CompiledProducts) -> bool:
    """Whether a few small products equal float32's up to bfloat16's rounding."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, outer in ((1, 576, 33), (5, 100, 17), (64, 8, 16)):
        x, weight = (torch.randn(n, inner, generator=generator).bfloat16() for n in (rows, outer))
        expected = F.linear(x.float(), weight.float())
        if not torch.allclose(products(x, weight).float(), expected, rtol=0.01, atol=0.01):
            return False
    return True
