"""Norm, activation, rotation and K and V compiled for a CPU, against the formulas in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from whiflash_kernels import layers
from whiflash_kernels.cpu.layers import CompiledLayers, compiled_layers

DTYPES = [torch.bfloat16, torch.float32]
SIZES = st.sampled_from([2, 6, 16, 100, 576])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledLayers:
    return compiled_layers(tmp_path_factory.getbasetemp().parent / "compiled")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, exact: Tensor) -> None:
    """Half a unit of the last place, and what float32's own operations add."""
    unit = 2**-8 if found.dtype == torch.bfloat16 else 0.0
    assert ((found.double() - exact).abs() <= unit * exact.abs() + 3e-6 * (1 + exact.abs())).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    size=SIZES,
    offset=st.sampled_from([0.0, 1.0]),
    adds=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_norms(compiled: CompiledLayers, rows: int, size: int, offset: float, adds: bool, dtype: torch.dtype) -> None:
    x, added, weight = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(rows, size)] * 2 + [(size,)]))
    total, normed = compiled.norm(x, weight, 1e-3, offset, added if adds else None)
    exact = x.double() + added.double() if adds else x.double()
    close(total, exact)
    close(normed, F.rms_norm(exact, (size,), weight.double() + offset, 1e-3))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 5), size=SIZES, dtype=st.sampled_from(DTYPES))
def test_activations(compiled: CompiledLayers, rows: int, size: int, dtype: torch.dtype) -> None:
    x = 20 * normal(rows, 2 * size, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    close(compiled.silu_and_mul(x), F.silu(gate) * up)


def test_activations_of_what_is_no_number(compiled: CompiledLayers) -> None:
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan, 200.0, -200.0])
    found = compiled.silu_and_mul(torch.cat([gate, torch.ones(5)])[None])
    assert torch.equal(found.isnan(), torch.tensor([[False, True, True, False, False]]))
    assert found[0, 0] == torch.inf
    assert (found[0, 3], found[0, 4]) == (200.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(64, 64), (48, 40), (16, 6)])
@pytest.mark.parametrize("named", [True, False])
def test_rotations(
    compiled: CompiledLayers, dtype: torch.dtype, table_dtype: torch.dtype, size: int, width: int, named: bool
) -> None:
    """Queries and keys where a projection left them, between values that stay."""
    qkv, table = normal(5, 7, size, dtype=dtype), normal(9 if named else 5, width, dtype=table_dtype, seed=1)
    rows = torch.tensor([8, 0, 3, 3, 1]).repeat_interleave(2)[::2] if named else None
    before = qkv.double()
    compiled.rotate(qkv[:, :3], qkv[:, 4:6], table, rows)
    cosine, sine = (table if rows is None else table[rows]).double()[:, None].chunk(2, -1)
    first, second, rest = before.split([width // 2, width // 2, size - width], -1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)
    turned[:, [3, 6]] = before[:, [3, 6]]
    close(qkv, turned)


def test_keys_and_values_reach_their_slots(compiled: CompiledLayers) -> None:
    k_pool, v_pool = torch.zeros(9, 2, 8), torch.zeros(9, 2, 4)
    wide, slots = normal(3, 40), torch.tensor([[7, 1], [0, 1], [3, 1]])[:, 0]
    k, v = wide[:, :16], wide[:, 20:28]
    compiled.keep(k, v, k_pool, v_pool, slots)
    for pool, rows in ((k_pool, k), (v_pool, v)):
        assert torch.equal(pool[slots].flatten(1), rows)
        assert not pool[[1, 2, 4, 5, 6, 8]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(compiled: CompiledLayers, dtype: torch.dtype) -> None:
    """Nor on threads: all 64 rows are shared between them, few are one's."""
    x, added, table = (normal(64, 1152, dtype=dtype, seed=seed) for seed in range(3))

    def results(part: slice) -> list[Tensor]:
        turned = x[part].reshape(-1, 6, 192).clone()
        compiled.rotate(turned[:, :4], turned[:, 4:], table[part, :96].contiguous(), None)
        return [*compiled.norm(x[part], table[0], 1e-5, 0.0, added[part]), compiled.silu_and_mul(x[part]), turned]

    whole = results(slice(0, 64))
    for begin, end in ((0, 1), (63, 64), (5, 9), (20, 53)):
        for found, expected in zip(results(slice(begin, end)), whole, strict=True):
            assert torch.equal(found, expected[begin:end])


def test_what_does_not_fit_is_refused(compiled: CompiledLayers) -> None:
    x, heads, table, pool = normal(3, 64), normal(3, 2, 32), normal(3, 32), torch.zeros(4, 64)
    before, three = heads.clone(), torch.arange(3)
    for refused in (
        lambda: compiled.norm(x, x[0, :63], 1e-5, 0.0),
        lambda: compiled.norm(x, x[0], 1e-5, 0.0, x[:2]),
        lambda: compiled.rotate(heads, heads[:2], table, three),
        lambda: compiled.rotate(heads, heads, normal(3, 34), three),
        lambda: compiled.rotate(heads, heads, table, three[:2]),
        lambda: compiled.rotate(heads, heads, table[:2], None),
        lambda: compiled.keep(x, x, pool[:, :63], pool, three),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            refused()
    with pytest.raises(ValueError, match="beyond the table's 3"):
        compiled.rotate(heads, heads, table, three + 1)
    for slots in (three + 2, three - 1):
        with pytest.raises(ValueError, match="beyond the pools' 4"):
            compiled.keep(x, x, pool, pool, slots)
    assert torch.equal(heads, before)
    assert not pool.any()


def test_what_it_takes_once_it_is_in_use(compiled: CompiledLayers) -> None:
    x, weight = normal(3, 64, dtype=torch.bfloat16), normal(64, dtype=torch.bfloat16)
    try:
        layers.use(compiled)
        assert layers.compiled_for(x) is None, "gradients may be wanted"
        with torch.no_grad():
            assert layers.compiled_for(x, weight) is compiled
            for others in ((x.half(),), (x, weight.float()), (x.t(),), (x.to("meta"),)):
                assert layers.compiled_for(*others) is None
            total, normed = layers.add_rms_norm(x, x, weight, 1e-5)
            assert torch.equal(total, x + x)
            assert torch.equal(normed, compiled.norm(x, weight, 1e-5, 0.0, x)[1])
            assert torch.equal(layers.silu_and_mul(x), compiled.silu_and_mul(x))
    finally:
        layers.use(None)
    assert layers.compiled_for(x) is None


def test_modes_that_see_operators_see_all_of_them(compiled: CompiledLayers) -> None:
    """A graph recorded from operators would leave out a call of a compiled function, and read what is gone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(3, 16), torch.randn(16)
    layers.use(compiled)
    try:
        with torch.no_grad():
            layers.rms_norm(x, weight, 1e-6)
            with Noting():
                layers.rms_norm(x, weight, 1e-6)
    finally:
        layers.use(None)
    assert any("norm" in name or "mean" in name for name in seen), seen
