"""What is measured of a drafter's layers: norm and activation at a chain's and a block's rows."""

from collections.abc import Iterator
from functools import partial

import torch
from cases import BATCHES, Bench, Case
from measure import Call
from whiflash_kernels.layers import rms_norm, silu_and_mul


def layer_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    for rows in sorted({size for batch in BATCHES for size in (batch, batch * s.block)}):
        x, weight = bench.random(rows, s.hidden), bench.random(s.hidden)
        yield Case(
            "rms_norm",
            f"{rows} x {s.hidden}",
            without_gradients(partial(rms_norm, x, weight, 1e-6)),
            2 * x.nbytes + weight.nbytes,
        )
        gate_up = bench.random(rows, 2 * s.intermediate)
        yield Case(
            "silu_and_mul",
            f"{rows} x {s.intermediate}",
            without_gradients(partial(silu_and_mul, gate_up)),
            gate_up.nbytes * 3 // 2,
        )


def without_gradients(call: Call) -> Call:
    """As a server calls it: what records gradients runs torch."""
    guarded: Call = torch.no_grad()(call)
    return guarded
