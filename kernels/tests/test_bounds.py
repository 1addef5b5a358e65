# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
"""The bounds that `kernel_bounds.py` puts around every launch, with kernels that leave them."""

import pytest
import torch
from kernel_backends import INTERPRETING

if not INTERPRETING:
    pytest.skip("only Triton's interpreter sees addresses", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy_kernel(source, target, begin, count, COLUMNS: tl.constexpr):
    column = begin + tl.arange(0, COLUMNS)
    inside = column < begin + count
    tl.store(target + column, tl.load(source + column, mask=inside, other=0), mask=inside)


@triton.jit
def _wide_kernel(halves, place):
    tl.load((halves + place).to(tl.pointer_type(tl.int64)))


@triton.jit
def _pooled_kernel(addresses, pool_like, place):
    tl.store(tl.load(addresses + 1).to(pool_like.dtype) + place, 1)


@triton.jit
def _count_kernel(totals, place, EXCHANGES: tl.constexpr):
    if EXCHANGES:
        tl.atomic_cas(totals + place, 0, 1)
    else:
        tl.atomic_add(totals + place, 1)


def copied(source: torch.Tensor, target: torch.Tensor, begin: int, count: int) -> None:
    _copy_kernel[(1,)](source, target, begin, count, COLUMNS=8)


def test_triton_may_use_all_of_a_view_and_nothing_beyond() -> None:
    """Both neighbours of each view are in its storage, and the tensors in one of both."""
    memory = torch.arange(30)
    source, target = memory[4:10], memory[20:26]
    copied(source, target, 0, 6)
    assert target.tolist() == [4, 5, 6, 7, 8, 9]
    for begin, count, place in ((0, 7, 48), (-1, 1, -8)):
        with pytest.raises(InterpreterError, match=rf"_copy_kernel.*a load of 8 bytes at {place} of source"):
            copied(source, target, begin, count)
    with pytest.raises(InterpreterError, match="a store of 8 bytes at 40 of target, which has 40; 1 of 8"):
        copied(source, memory[20:25], 0, 6)
    assert memory[26:].tolist() == [26, 27, 28, 29]


@pytest.mark.parametrize("place", [-1, 3])
def test_triton_needs_all_bytes_of_an_element_within(place: int) -> None:
    memory = torch.zeros(12, dtype=torch.int32)
    _wide_kernel[(1,)](memory[4:8], 2)
    with pytest.raises(InterpreterError, match=f"a load of 8 bytes at {4 * place} of halves, which has 16"):
        _wide_kernel[(1,)](memory[4:8], place)


@pytest.mark.parametrize("exchanges", [False, True])
def test_triton_may_not_count_beyond(exchanges: bool) -> None:
    totals = torch.zeros(4, dtype=torch.int32)
    _count_kernel[(1,)](totals[:3], 2, EXCHANGES=exchanges)
    assert totals.tolist() == [0, 0, 1, 0]
    with pytest.raises(InterpreterError, match="of 4 bytes at 12 of totals, which has 12"):
        _count_kernel[(1,)](totals[:3], 3, EXCHANGES=exchanges)


@pytest.mark.parametrize("place", [-1, 4])
def test_triton_stays_in_pools_that_are_passed_by_their_addresses(place: int) -> None:
    memory = torch.zeros(3, 6)
    pools = memory[1, 1:5], memory[2, 1:5]
    addresses = torch.tensor([pool.data_ptr() for pool in pools])
    _pooled_kernel[(1,)](addresses, pools[0], 3)
    with pytest.raises(InterpreterError, match=r"_pooled_kernel.*a store of 4 bytes at \d+ of no argument"):
        _pooled_kernel[(1,)](addresses, pools[0], place)
    assert memory.nonzero().tolist() == [[2, 4]]
