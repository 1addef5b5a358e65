"""Compiled bfloat16 products for processors with AVX2 and without bfloat16 instructions.

There torch takes 4 to 7 times as long as for float32, and a verification of twelve rows eleven times as long as a step
of one. `products.cpp` says what is computed and how.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.cpu import compiler

_SOURCE = Path(__file__).with_name("products.cpp")
_PROFILED = compiler.profiled("product")


def product(library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear` for bfloat16 on a CPU by the compiled `library`.

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
        library.whiflash_product(
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
def compiled_products(directory: Path) -> Callable[..., Tensor]:
    """Return `product` with its library, compiled into `directory` or loaded from there, if it agrees with torch.

    Raises:
        OSError: it cannot be compiled or loaded, does not share torch's threads, or computes something else.
    """
    library = compiler.load(_SOURCE, directory, ["-fopenmp"], "product:vplpppiii")
    return compiler.checked(library, partial(product, library), _agrees)


def _agrees(products: Callable[..., Tensor]) -> bool:
    """Whether a few small products equal float32's up to bfloat16's rounding."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, outer in ((1, 576, 33), (5, 100, 17), (64, 8, 16)):
        x, weight = (torch.randn(n, inner, generator=generator).bfloat16() for n in (rows, outer))
        expected = F.linear(x.float(), weight.float())
        if not torch.allclose(products(x, weight).float(), expected, rtol=0.01, atol=0.01):
            return False
    return True
