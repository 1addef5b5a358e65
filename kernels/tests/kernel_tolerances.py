"""The one table of tolerances. Integers, and floats that are only copied, are compared exactly instead."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed difference: ``absolute + relative * (largest value of the expected tensor)``."""

    absolute: float
    relative: float
    reason: str


TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("entropy", torch.float32): Tolerance(
        3e-5, 0.0, "float32 sums of up to 256 k weights in another order; about 256 ulp of ln 256 k = 12.5 nats"
    ),
    ("probability", torch.float32): Tolerance(
        3e-6, 0.0, "1 / sum of float32 exponentials; exp2 on a GPU is good to 2 ulp, sums add a few"
    ),
    ("kv", torch.float32): Tolerance(
        0.0, 1e-5, "matrix products round by shape and library: the design's bound for replays, of the largest value"
    ),
    ("kv", torch.float16): Tolerance(
        0.0, 4e-3, "two products and a norm, each rounded to 11 bits: 2^-11 = 4.9e-4 a rounding, 8 of them"
    ),
    ("kv", torch.bfloat16): Tolerance(0.0, 3e-2, "as float16 with 8 bits: 2^-8 = 3.9e-3 a rounding, 8 of them"),
    ("attention", torch.float32): Tolerance(
        0.0, 1e-5, "two products and a softmax in another order, of the largest value"
    ),
    ("attention", torch.float16): Tolerance(0.0, 4e-3, "weights and result rounded to 11 bits"),
    ("attention", torch.bfloat16): Tolerance(0.0, 2e-2, "weights and result rounded to 8 bits"),
    ("router", torch.float32): Tolerance(1e-5, 1e-5, "two float32 products in another order"),
    ("router", torch.bfloat16): Tolerance(
        0.0, 3e-2, "torch rounds the hidden layer to 8 bits, the kernel does not: sums of rounded terms"
    ),
}


def assert_close(actual: Tensor, expected: Tensor, kind: str, dtype: torch.dtype) -> None:
    """Compare with the float64 (or float32) ``expected`` under the table's entry; NaN never passes."""
    tolerance = TOLERANCES[kind, dtype]
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    bound = tolerance.absolute + tolerance.relative * expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    assert difference <= bound, f"{kind} in {dtype}: off by {difference:.3g}, allowed {bound:.3g} ({tolerance.reason})"
