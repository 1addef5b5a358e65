"""Matrix products with a packed copy of the weight (in oneDNN's blocks, or in float8), or by a compiled kernel.

oneDNN, which runs torch's bfloat16 products on CPUs, reads a weight in blocks. If it gets rows, as torch stores them,
it copies them into blocks at every call. With a dozen rows or fewer (decoding, verifying, drafting) that takes as long
as the product. A permanent copy in blocks costs the weight's size in memory and saves that time. The kernels are the
same, and so are their results.

On processors for which oneDNN has no bfloat16 (AVX2 alone) torch's products are slow. There a compiled kernel
(`whiflash_kernels.cpu.products`) takes weights as they are, once a process has set it with :func:`use`.

In float8 a drafter's weight is half as many bytes (`whiflash_kernels.float8`).
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.float8 import multiplies, product, quantise_rows
from whiflash_kernels.processor import onednn_has_bfloat16

_COPY, _FLOAT8 = "_whiflash_packed", "_whiflash_float8"

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function like `torch.nn.functional.linear`, for bfloat16 on a CPU."""

_compiled: Product | None = None


def use(products: Product | None) -> None:
    """Multiply weights that have no copy by `products`; None: by torch."""
    global _compiled
    _compiled = products


def has_kernel(weight: Tensor) -> bool:
    """Whether :func:`linear` multiplies `weight` by something else than torch's own product."""
    return is_packed(weight) or (_compiled is not None and _is_matrix(weight))


def _is_matrix(weight: Tensor) -> bool:
    """Whether a CPU's kernels take `weight` [N, K]: contiguous bfloat16."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.ndim == 2
        and weight.numel() > 0
        and weight.is_contiguous()
    )


def packable(weight: Tensor) -> bool:
    """Whether products with `weight` [N, K] gain from a copy in blocks and stay the same bit by bit: bfloat16 on a CPU
    whose oneDNN kernels were compared (`_same_bits`)."""
    return _is_matrix(weight) and not weight.requires_grad and _same_bits()


@cache
def _same_bits() -> bool:
    """Whether oneDNN multiplies bfloat16 on this processor, and packed weights give what torch's own products give.

    The kernel that oneDNN takes depends on the processor, and nothing documents equal results, so a few are compared.
    """
    if not onednn_has_bfloat16():
        return False
    generator = torch.Generator().manual_seed(0)
    # RuntimeError: this build of torch lacks an operator; then the answer is no.
    with torch.inference_mode(False), torch.no_grad(), suppress(RuntimeError):
        for inner, outer in ((7, 3), (100, 65), (576, 960), (1536, 576)):
            weight = torch.randn(outer, inner, generator=generator).bfloat16()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            for rows in (1, 2, 5, 17, 64):
                x = torch.randn(rows, inner, generator=generator).bfloat16()
                product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
                if not torch.equal(product, F.linear(x, weight)):
                    return False
        return True
    return False


def pack(weights: Iterable[Tensor], at_most: float) -> int:
    """Keep a copy in blocks beside each `packable` weight that has none yet, for :func:`linear`.

    The copy stays with the tensor object, not with views of it. Call :func:`unpack` before you write into a weight.

    Args:
        weights: [N, K] each. at_most: bytes that the copies may take; should they take more, none is made.

    Returns:
        Bytes of the copies that were made.
    """
    packed = {id(weight): weight for weight in weights if packable(weight) and not is_packed(weight)}
    size = sum(weight.nbytes for weight in packed.values())
    if size > at_most:
        return 0
    with torch.inference_mode(False), torch.no_grad():
        for weight in packed.values():
            setattr(weight, _COPY, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None))
    return size


def unpack(weights: Iterable[Tensor]) -> None:
    """Forget the copies of these weights, where they have any."""
    for weight in weights:
        if is_packed(weight):
            delattr(weight, _COPY)


def quantise(weights: Iterable[object]) -> None:
    """Keep a copy in float8 beside each weight [N, K], for :func:`linear`: on a CPU its numbers in a wider type.

    Skipped are objects that are no tensors, and sizes that are no multiple of 16: kernels do not take them.
    """
    with torch.inference_mode(False), torch.no_grad():
        for weight in weights:
            if isinstance(weight, Tensor) and all(size % 16 == 0 for size in weight.shape):
                values, scale = quantise_rows(weight.detach())
                if not multiplies(weight):
                    values = values.to(torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
                setattr(weight, _FLOAT8, (values, scale))


def requantise(weight: object) -> None:
    """Quantise `weight` again, which was written in place, if it has a copy in float8."""
    if (held := getattr(weight, _FLOAT8, None)) is not None:
        quantise_rows(cast("Tensor", weight).detach(), into=held)


def rows(weight: Tensor, which: slice) -> Tensor:
    """Return a view of some rows of a weight, with these rows of its float8 copy; a copy in blocks has no rows."""
    part = weight[which]
    if (held := getattr(weight, _FLOAT8, None)) is not None:
        setattr(part, _FLOAT8, tuple(each[which] for each in held))
    return part


def follow(weight: Tensor) -> None:
    """Renew the weight's copies, in blocks and in float8, after numbers were written into it."""
    requantise(weight)
    if is_packed(weight):
        unpack([weight])
        pack([weight], at_most=weight.nbytes)


def is_packed(weight: Tensor) -> bool:
    """Whether :func:`pack` has made a copy of this tensor."""
    return hasattr(weight, _COPY)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear` with the weight's packed copy, or by the kernel set with :func:`use`.

    Numerics of a copy in blocks: oneDNN's sums in float32, rounded once, bit by bit as in
    `torch.nn.functional.linear`. One exception: torch rounds once more before it adds a bias to rows of more than two
    dimensions that are not contiguous. In float8: `whiflash_kernels.float8.product`.
    Fallback: that of torch, for other dtypes than bfloat16, a bias that is not N contiguous numbers (kernels would
    read beyond it), where gradients are wanted, and for a weight without a copy where no kernel is set.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N].

    Returns:
        [..., N] in the dtype of `x`.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return F.linear(x, weight, bias)
    if x.numel() and (held := getattr(weight, _FLOAT8, None)) is not None:
        made = product(x.reshape(-1, x.shape[-1]).contiguous(), held, bias)
        return made.view(*x.shape[:-1], len(weight))
    fits = bias is None or (bias.dtype, bias.shape, bias.is_contiguous()) == (x.dtype, weight.shape[:1], True)
    if x.dtype != torch.bfloat16 or not has_kernel(weight) or not fits:
        return F.linear(x, weight, bias)
    packed = getattr(weight, _COPY, None)
    if packed is None:
        assert _compiled is not None
        return _compiled(x, weight, bias)
    by_blocks: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return by_blocks
