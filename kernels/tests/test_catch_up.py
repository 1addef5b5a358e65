"""Both catch-ups against float64 loops over rows, layers and heads."""

from dataclasses import dataclass, replace
from typing import Any

import kernel_oracles as oracles
import pytest
import torch
from kernel_backends import DEVICE, guarded_outputs, running
from kernel_tolerances import assert_close
from whiflash_kernels import DFlashWeights, Eagle3Weights, KVPools, dflash_catch_up, eagle3_catch_up

SENTINEL = 77.0
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of a drafter and of its batch."""

    rows: int = 5
    hidden: int = 48
    chunks: int = 3
    layers: int = 2
    heads: int = 2
    dim: int = 16
    rotary: int = 16
    slots: int = 64


class Source:
    """Seeded tensors of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(11)

    def __call__(self, *size: int) -> torch.Tensor:
        scale = size[-1] ** -0.5 if len(size) > 1 else 1.0
        return (torch.randn(*size, generator=self.generator) * scale).to(self.dtype).to(DEVICE)

    def features(self, shape: Shape) -> torch.Tensor:
        return self(shape.rows, shape.chunks * shape.hidden) * 3

    def rope(self, shape: Shape) -> torch.Tensor:
        angles = torch.rand(40, shape.rotary // 2, generator=self.generator) * 6.3
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(DEVICE)

    def places(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and distinct slots; the last of several rows is padding."""
        positions = torch.randint(0, 40, (shape.rows,), generator=self.generator)
        slots = torch.randperm(shape.slots, generator=self.generator)[: shape.rows]
        if shape.rows > 1:
            slots[-1] = -1
        return positions.to(DEVICE), slots.to(DEVICE)


def sentinel_pools(shape: Shape, dtype: torch.dtype, layout: str = "separate") -> KVPools:
    size = (shape.slots, shape.heads, shape.dim)
    if layout == "strided":  # one tensor for everything, K and V side by side: nothing is contiguous
        whole = torch.full((shape.layers, size[0], 2, *size[1:]), SENTINEL, dtype=dtype, device=DEVICE)
        return KVPools(tuple(layer[:, 0] for layer in whole), tuple(layer[:, 1] for layer in whole))
    if layout == "spaced":  # a gap behind every head
        wide = torch.full((2, shape.layers, *size[:2], size[2] + 4), SENTINEL, dtype=dtype, device=DEVICE)
        return KVPools(*(tuple(layer[..., : shape.dim] for layer in pools) for pools in wide))
    if layout == "unaligned":
        flat = [
            torch.full((1 + size[0] * size[1] * size[2],), SENTINEL, dtype=dtype, device=DEVICE)
            for _ in range(2 * shape.layers)
        ]
        pools = [tensor[1:].view(size) for tensor in flat]
        return KVPools(tuple(pools[: shape.layers]), tuple(pools[shape.layers :]))
    return KVPools(
        *(tuple(torch.full(size, SENTINEL, dtype=dtype, device=DEVICE) for _ in range(shape.layers)) for _ in range(2))
    )


def dflash_weights(source: Source, shape: Shape, *, norm: bool = True, bias: bool = False) -> DFlashWeights:
    outputs = shape.layers * 2 * shape.heads * shape.dim
    return DFlashWeights(
        fc=source(shape.hidden, shape.chunks * shape.hidden),
        hidden_norm=source(shape.hidden),
        kv=source(outputs, shape.hidden),
        k_norm=source(shape.layers, shape.dim) * shape.dim**0.5 if norm else None,
        eps=EPS,
        fc_bias=source(shape.hidden) if bias else None,
        kv_bias=source(outputs) if bias else None,
    )


def eagle3_weights(source: Source, shape: Shape) -> Eagle3Weights:
    return Eagle3Weights(
        fc=source(shape.hidden, shape.chunks * shape.hidden),
        embedding=source(50, shape.hidden),
        input_norm=source(shape.hidden),
        hidden_norm=source(shape.hidden),
        kv=source(2 * shape.heads * shape.dim, 2 * shape.hidden),
        eps=EPS,
    )


def check_pools(pools: KVPools, rows, k_norm, positions, slots, rope, dtype: torch.dtype) -> None:
    """Compare whole pools: rows that were not named must still hold the sentinel exactly."""
    wide = [torch.full(pool.shape, SENTINEL, dtype=torch.float64) for pool in (*pools.k, *pools.v)]
    layers = len(pools.k)
    oracles.write_kv(
        [row.cpu() for row in rows],
        None if k_norm is None else k_norm.cpu(),
        EPS,
        positions.tolist(),
        slots.tolist(),
        rope.double().cpu(),
        wide[:layers],
        wide[layers:],
    )
    named = slots[slots >= 0].cpu()
    others = torch.ones(pools.k[0].shape[0], dtype=torch.bool)
    others[named] = False
    for pool, expected in zip((*pools.k, *pools.v), wide, strict=True):
        assert (pool.cpu()[others] == SENTINEL).all()
        assert_close(pool.cpu()[named], expected[named], "kv", dtype)


def check_dflash(
    backend: str,
    shape: Shape,
    dtype: torch.dtype,
    *,
    layout: str = "separate",
    sliced: bool = False,
    pool_dtype: torch.dtype | None = None,
    **options: bool,
) -> None:
    """sliced: the drafter's columns are a view into the captured union."""
    source, kept = Source(dtype), pool_dtype or dtype
    weights = dflash_weights(source, shape, **options)
    features, rope = source.features(shape), source.rope(shape)
    if sliced:
        features = torch.cat([features, features], dim=1)[:, shape.hidden : shape.hidden * 4]
    positions, slots = source.places(shape)
    pools = sentinel_pools(shape, kept, layout)
    with running(backend), guarded_outputs():
        fused = dflash_catch_up(features, positions, slots, weights, rope, pools)
    assert fused.shape == (shape.rows, shape.hidden)
    check_pools(pools, oracles.dflash_rows(features, weights), weights.k_norm, positions, slots, rope, kept)


def check_eagle3(backend: str, shape: Shape, dtype: torch.dtype, *, sliced: bool = False, **options: object) -> None:
    """sliced: the rotations are a part of a wider table."""
    source = Source(dtype)
    weights = replace(
        eagle3_weights(source, shape),
        **{name: make(source) if callable(make) else make for name, make in options.items()},
    )
    features, rope = source.features(shape), source.rope(shape)
    rope = torch.cat([rope, rope], dim=1)[:, : shape.rotary] if sliced else rope
    positions, slots = source.places(shape)
    next_tokens = torch.arange(shape.rows, device=DEVICE) * 7 % 50
    pools = sentinel_pools(shape, dtype)
    with running(backend), guarded_outputs():
        fused = eagle3_catch_up(features, next_tokens, positions, slots, weights, rope, pools)
    rows, fused_rows = oracles.eagle3_rows(features, next_tokens.tolist(), weights)
    if rows:
        assert_close(fused, torch.stack(fused_rows), "kv", dtype)
    check_pools(pools, rows, weights.k_norm, positions, slots, rope, dtype)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(rows=0),
        Shape(rows=1),
        Shape(hidden=40, heads=3, dim=20, rotary=20),  # no power of two
        Shape(heads=1, dim=64, rotary=32, layers=5),  # half of each head is not rotated
        Shape(heads=3, dim=20, rotary=6),
    ],
    ids=str,
)
def test_dflash(backend: str, dtype: torch.dtype, shape: Shape) -> None:
    check_dflash(backend, shape, dtype)


@pytest.mark.parametrize(
    "options",
    [
        *({"layout": layout} for layout in ("strided", "spaced", "unaligned")),
        {"norm": False, "bias": True},
        {"sliced": True},
        {"pool_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_dflash_variants(backend: str, options: dict[str, Any]) -> None:
    check_dflash(backend, Shape(), torch.float32, **options)


def test_dflash_256_rows(backend: str) -> None:
    check_dflash(backend, Shape(rows=256, slots=300, layers=1, heads=1, dim=8, rotary=8), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [Shape(layers=1), Shape(rows=0, layers=1), Shape(rows=1, layers=1, hidden=40, heads=3, dim=20, rotary=6)],
    ids=str,
)
def test_eagle3(backend: str, dtype: torch.dtype, shape: Shape) -> None:
    check_eagle3(backend, shape, dtype)


def test_eagle3_variants(backend: str) -> None:
    shape = Shape(layers=1)
    check_eagle3(backend, shape, torch.float32, chunk_norms=lambda source: source(3, 48) * 7)
    check_eagle3(backend, shape, torch.float32, concat_norm=lambda source: source(3 * 48))
    check_eagle3(backend, shape, torch.float32, sliced=True, embedding=lambda source: source(50, 64)[:, 8:56])
    check_eagle3(
        backend,
        shape,
        torch.float32,
        k_norm=lambda source: source(1, 16) * 4,
        fc_bias=lambda source: source(48),
        kv_bias=lambda source: source(64),
    )


def test_rejects_what_does_not_fit() -> None:
    shape, source = Shape(), Source(torch.float32)
    weights, features, rope = dflash_weights(source, shape), source.features(shape), source.rope(shape)
    positions, slots = source.places(shape)
    pools = sentinel_pools(shape, torch.float32)
    with pytest.raises(ValueError, match="layers \\* 2 \\* heads \\* dim"):
        dflash_catch_up(features, positions, slots, replace(weights, kv=weights.kv[1:]), rope, pools)
    with pytest.raises(ValueError, match=r"weights\.fc takes"):
        dflash_catch_up(features[:, 1:], positions, slots, weights, rope, pools)
    with pytest.raises(ValueError, match="rope_table has 17 columns"):
        dflash_catch_up(features, positions, slots, weights, torch.zeros(9, 17, device=DEVICE), pools)
    with pytest.raises(ValueError, match="differ in rows"):
        dflash_catch_up(features, positions[1:], slots, weights, rope, pools)
    two_layers = replace(eagle3_weights(source, shape), kv=weights.kv)
    with pytest.raises(ValueError, match="one-layer EAGLE-3 only"):
        eagle3_catch_up(features, positions, positions, slots, two_layers, rope, pools)


def test_pools_that_do_not_match() -> None:
    pool = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="as many K as V"):
        KVPools((pool,), (pool, pool))
    with pytest.raises(ValueError, match="share shape"):
        KVPools((pool,), (pool.double(),))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        KVPools((pool.transpose(1, 2),), (pool.transpose(1, 2),))
