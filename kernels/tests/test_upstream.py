"""Our DFlash catch-up and SGLang's materialisation helper write the same K and V; needs SGLang installed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_backends import BACKENDS, running
from kernel_tolerances import assert_close
from test_catch_up import Shape, Source, dflash_weights, sentinel_pools
from whiflash_kernels import dflash_catch_up

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("backend", ["triton"])
def test_same_keys_and_values_as_sglang(backend: str) -> None:
    upstream = pytest.importorskip("upstream")
    shapes = pytest.importorskip("shapes")
    shape, source = Shape(hidden=64, layers=3, heads=2, dim=32, rotary=32), Source(torch.float32)
    weights, rope, features = dflash_weights(source, shape), source.rope(shape), source.features(shape)
    positions, slots = source.places(shape)
    slots[-1] = 63  # upstream has no padding rows
    slots[slots == 0] = 62  # nor does it write slot 0
    ours, theirs = sentinel_pools(shape, torch.float32), sentinel_pools(shape, torch.float32)
    model = replace(shapes.SHAPES["smollm2-135m"], hidden=64, kv_heads=2, dim=32, dtype=torch.float32)
    upstream.materialise(model, (features, positions, slots, weights, rope, theirs))()
    with running(backend):
        dflash_catch_up(features, positions, slots, weights, rope, ours)
    for mine, other in zip((*ours.k, *ours.v), (*theirs.k, *theirs.v), strict=True):
        assert_close(mine, other, "kv", torch.float32)
