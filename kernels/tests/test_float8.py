"""Rows in float8 against the table of its numbers; products against float64, on a card by its own kernels."""

import pytest
import torch
from kernel_backends import DEVICE
from torch import Tensor
from whiflash_kernels import packed
from whiflash_kernels.float8 import FLOAT8, multiplies, quantise_rows

NUMBERS = torch.arange(127, dtype=torch.uint8).view(FLOAT8).double()
"""Numbers of float8 from 0 on; the bits of number i are those of i."""


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of very different sizes."""
    size, sign = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(columns))
    return (torch.exp(3 * size) * sign).to(DEVICE, dtype)


def nearest(x: Tensor) -> Tensor:
    """Each row's nearest numbers at its scale, float64: of two that are as near the one with even bits."""
    scale = x.float().abs().amax(-1, keepdim=True).cpu() / 448
    scaled = (x.float().cpu() / scale).double()
    apart = (scaled.abs()[..., None] - NUMBERS).abs()
    return torch.copysign(NUMBERS[(apart + torch.arange(127) % 2 * 1e-12).argmin(-1)], scaled) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_and_products(dtype: torch.dtype) -> None:
    x, weight, bias = matrix(40, 112, dtype), matrix(96, 112, dtype), matrix(1, 96, dtype)[0]
    x[0], x[0, 0] = ((NUMBERS[15:] + NUMBERS[14:-1]) / 2).to(x), 448.0  # in the middle of two
    values, scale = quantise_rows(x)
    off = (values.cpu().double() * scale.cpu()[:, None] - nearest(x)).abs() > 1e-6 * nearest(x).abs()
    # A card's kernel multiplies by the reciprocal: what is as near to two may go to the other.
    assert off.double().mean() <= 0.02 * multiplies(x)
    assert not quantise_rows(torch.zeros(2, 16).to(x))[0].float().any()
    packed.quantise([weight])
    found = packed.linear(x.view(4, 10, 112), weight, bias).view(40, 96).double().cpu()
    size = x.abs().double() @ weight.abs().double().T + bias.abs()
    expected = nearest(x) @ nearest(weight).T + bias.double().cpu()
    assert ((found - expected).abs() <= size.cpu() * (2**-7 if dtype == torch.bfloat16 else 1e-5)).all()


def test_copies_follow_what_is_written_and_are_cut() -> None:
    """Captured passes read the copies, so these are written in place; a shard has its rows' own."""
    weight, odd, x = matrix(64, 32), matrix(24, 32), matrix(5, 32)
    packed.quantise([weight, odd])
    assert torch.equal(packed.linear(x, odd), torch.nn.functional.linear(x, odd))
    other, address = weight.flip(0).clone(), getattr(weight, packed._FLOAT8)[0].data_ptr()
    packed.quantise([other])
    weight.copy_(other)
    packed.follow(weight)
    assert getattr(weight, packed._FLOAT8)[0].data_ptr() == address
    assert torch.equal(packed.linear(x, weight), packed.linear(x, other))
    own, shard = packed.rows(weight, slice(16, None)), weight[16:].clone()
    packed.quantise([shard])
    assert torch.equal(packed.linear(x, shard), packed.linear(x, weight)[:, 16:])
    assert torch.equal(packed.linear(x, own), packed.linear(x, shard))
    assert packed.linear(x[:0], weight).shape == (0, 64)
