"""Compiled products of bfloat16 against float64, row by row."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from whiflash_kernels import packed
from whiflash_kernels.cpu.products import compiled_products


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    return compiled_products(tmp_path_factory.mktemp("compiled"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    inner=st.sampled_from([1, 7, 8, 64, 100, 576]),
    outer=st.sampled_from([1, 3, 16, 17, 65]),
    biased=st.booleans(),
)
def test_products_are_those_of_float64_rounded(
    products: Callable[..., Tensor], rows: int, inner: int, outer: int, biased: bool
) -> None:
    x, weight, bias = normal(rows, inner), normal(outer, inner, seed=1), normal(outer, seed=2)
    found = products(x, weight, bias if biased else None).double()
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    # Half a unit of bfloat16's last place, and float32's sums.
    assert ((found - exact).abs() <= 2**-8 * exact.abs() + inner * 2**-24 * size).all()


def test_a_row_does_not_depend_on_its_neighbours(products: Callable[..., Tensor]) -> None:
    weight, x = normal(960, 576), normal(64, 576, seed=1)
    whole = products(x, weight)
    for rows in (1, 2, 3, 4, 5, 17, 33):
        assert torch.equal(products(x[:rows], weight), whole[:rows])
        assert torch.equal(products(x[-rows:], weight), whole[-rows:])


@pytest.mark.parametrize("inner", [64, 61])
def test_infinities_and_nan_stay_in_their_row(products: Callable[..., Tensor], inner: int) -> None:
    x, weight = normal(4, inner), normal(20, inner, seed=1)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    found = products(x, weight)
    assert torch.equal(found[1].float(), torch.where(weight[:, 3] > 0, torch.inf, -torch.inf))
    assert found[2].isnan().all()
    assert found[[0, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 64), (0, 64), (64,)])
def test_any_number_of_dimensions(products: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    weight, x = normal(32, 64), normal(*shape, seed=1)
    torch.testing.assert_close(products(x, weight), F.linear(x, weight))


def test_strided_rows(products: Callable[..., Tensor]) -> None:
    weight, wide = normal(32, 64), normal(12, 128, seed=1)
    for x in (wide[::2, 32:96], wide[:, ::2], wide[:1, :64].expand(5, 64)):
        assert torch.equal(products(x, weight), products(x.contiguous(), weight))


@pytest.mark.parametrize(("x", "bias"), [((3, 63), 32), ((3, 64), 31)])
def test_shapes_that_do_not_fit_are_refused(products: Callable[..., Tensor], x: tuple[int, int], bias: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        products(normal(*x), normal(32, 64), normal(bias))


def test_what_it_takes_once_it_is_in_use(products: Callable[..., Tensor]) -> None:
    weight, x = normal(32, 64), normal(3, 64, seed=1)
    strided, learned = normal(64, 32).t(), weight.clone().requires_grad_()
    try:
        packed.use(products)
        assert packed.has_kernel(weight)
        assert torch.equal(packed.linear(x, weight), products(x, weight))
        for other in (weight.float(), strided, weight[:0]):
            assert not packed.has_kernel(other)
        assert torch.equal(packed.linear(x.float(), weight.float()), F.linear(x.float(), weight.float()))
        assert packed.linear(x, learned).requires_grad
    finally:
        packed.use(None)
    assert not packed.has_kernel(weight)
