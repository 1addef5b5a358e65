"""Products with packed weights equal torch's, bit by bit; what cannot be packed is multiplied as before."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from whiflash_kernels import packed
from whiflash_kernels.packed import follow, is_packed, linear, pack, packable, unpack


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns)).to(dtype)


needs_onednn = pytest.mark.skipif(not packable(matrix(8, 8)), reason="oneDNN multiplies no bfloat16 on this processor")


@needs_onednn
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    inner=st.sampled_from([1, 7, 32, 64, 100, 576]),
    outer=st.sampled_from([1, 3, 16, 48, 65, 960]),
    biased=st.booleans(),
)
def test_the_product_is_torchs_bit_by_bit(rows: int, inner: int, outer: int, biased: bool) -> None:
    weight, x = matrix(outer, inner), matrix(rows, inner)
    bias = matrix(1, outer)[0] if biased else None
    assert pack([weight], weight.nbytes) == weight.nbytes
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@needs_onednn
@pytest.mark.parametrize(
    ("x", "bias"),
    [
        *((torch.randn(*shape).bfloat16(), None) for shape in ((2, 3, 64), (0, 64), (64,))),
        (matrix(12, 128)[::2, 32:96], None),
        (matrix(3, 64), matrix(1, 64)[0, ::2]),
    ],
    ids=["three dimensions", "no rows", "one row", "strided rows", "strided bias"],
)
def test_any_layout(x: Tensor, bias: Tensor | None) -> None:
    weight = matrix(32, 64)
    pack([weight], weight.nbytes)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


@needs_onednn
def test_what_torch_refuses_is_refused() -> None:
    weight, x = matrix(32, 64), matrix(3, 64)
    pack([weight], weight.nbytes)
    for states, bias in ((x, torch.zeros(32)), (x, torch.zeros(31).bfloat16()), (x.float(), None)):
        with pytest.raises(RuntimeError, match=r"dtype|expanded size"):  # torch's own refusals
            linear(states, weight, bias)


@needs_onednn
def test_gradients_reach_what_wants_them() -> None:
    weight, x = matrix(32, 64), matrix(3, 64).requires_grad_()
    pack([weight], weight.nbytes)
    linear(x, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    bias = torch.zeros(32).bfloat16().requires_grad_()
    linear(matrix(3, 64), weight, bias).sum().backward()
    assert bias.grad is not None
    linear(matrix(3, 64), weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


@needs_onednn
def test_nothing_is_packed_beyond_the_limit_and_nothing_twice() -> None:
    first, second = matrix(32, 64), matrix(16, 64)
    both = first.nbytes + second.nbytes
    assert pack([first, second], both - 1) == 0
    assert not is_packed(first)
    assert not is_packed(second)
    assert pack([first, first, second], both) == both
    assert pack([first, second], both) == 0


@needs_onednn
def test_a_copy_is_of_the_weight_as_it_was_until_it_is_forgotten() -> None:
    weight, x = matrix(32, 64), matrix(3, 64)
    pack([weight], weight.nbytes)
    unpack([weight, matrix(4, 4)])
    weight.data.copy_(matrix(33, 64)[1:])
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    pack([weight], weight.nbytes)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    weight.data.copy_(matrix(34, 64)[2:])
    follow(weight)
    assert is_packed(weight)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "weight",
    [matrix(8, 8, torch.float32), matrix(8, 8)[0], matrix(8, 8)[:, :4], matrix(0, 8), matrix(8, 8).requires_grad_()],
)
def test_what_is_left_alone(weight: Tensor) -> None:
    assert not packable(weight)
    assert pack([weight], 1e9) == 0


def test_a_processor_whose_products_differ_packs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = F.linear
    packed._same_bits.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(packed.F, "linear", lambda *given: own(*given) + 1)
            assert not packable(matrix(8, 8))
            assert pack([matrix(8, 8)], 1e9) == 0
    finally:
        packed._same_bits.cache_clear()
