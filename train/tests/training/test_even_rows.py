"""Rows that fill a product up change neither it nor its gradients."""

import pytest
import torch
import torch.nn.functional as F

from whiflash_train.drafters.batches import ROWS, EvenRows


@pytest.mark.parametrize("shape", [(1,), (ROWS,), (ROWS + 1,), (3, 50), (0,)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_and_gradients_are_the_same(
    shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if biased else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    plain = F.linear(x, weight, bias)
    wanted = torch.autograd.grad(plain.square().sum(), leaves)
    seen: list[int] = []
    pad = F.pad
    monkeypatch.setattr(F, "pad", lambda given, by: seen.append(len(given) + by[3]) or pad(given, by))
    with EvenRows():
        filled = F.linear(x, weight, bias)
        gradients = torch.autograd.grad(filled.square().sum(), leaves)
    torch.testing.assert_close(filled, plain)
    for gradient, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected)
    assert seen
    assert all(rows % ROWS == 0 for rows in seen)


def test_layers_take_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, seen = torch.nn.Linear(4, 3), torch.randn(5, 4), []
    pad = F.pad
    monkeypatch.setattr(F, "pad", lambda given, by: seen.append(by[3]) or pad(given, by))
    with EvenRows():
        found = layer(x)
        named = F.linear(input=x, weight=layer.weight, bias=layer.bias)
    torch.testing.assert_close(found, layer(x))
    torch.testing.assert_close(named, layer(x))
    assert seen == [ROWS - 5]
