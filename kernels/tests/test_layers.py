"""Norm, activation and rotation: torch's fallback is the formula, and FlashInfer is called as it wants to be.

Without a card its functions are stand-ins that take their arguments by the installed package's own signatures, check
what its kernels demand, and compute the formula; with one the kernels themselves run.
"""

import importlib
import inspect
from typing import Any

import pytest
import torch
from kernel_backends import DEVICE, running
from torch import Tensor
from whiflash_kernels import layers

ON_GPU = DEVICE.type == "cuda"
SHAPES = [(5, 64), (5, 3, 64), (2, 5, 3, 64)]

needs_flashinfer = pytest.mark.skipif(not layers.AVAILABLE, reason="FlashInfer is not installed")


@pytest.fixture(autouse=True)
def no_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ran before in this process has set them."""
    monkeypatch.setattr(layers, "_compiled", None)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def activated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + (-gate).exp()) * up


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = cosine.shape[-1]
    out = x.double().clone()
    first, second = x[..., :half].double(), x[..., half : 2 * half].double()
    cosine, sine = cosine.double()[:, None], sine.double()[:, None]
    out[..., :half] = first * cosine - second * sine
    out[..., half : 2 * half] = second * cosine + first * sine
    return out


def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)


def close(found: Tensor, expected: Tensor) -> None:
    exact = found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_torch_norms_by_the_formula(shape: tuple[int, ...], dtype: torch.dtype, unit_offset: bool) -> None:
    x, weight = random(*shape, dtype=dtype), random(64, dtype=dtype)
    with running("torch"), torch.no_grad():
        found = layers.rms_norm(x, weight, 1e-3, unit_offset=unit_offset)
    close(found, normed(x, weight + unit_offset if dtype == torch.float32 else weight.double() + unit_offset, 1e-3))
    assert found.dtype == dtype


def test_torch_activates_by_the_formula() -> None:
    x = random(5, 48, dtype=torch.float32)
    with running("torch"), torch.no_grad():
        close(layers.silu_and_mul(x), activated(x))


def test_gradients_go_through_torch() -> None:
    x = random(5, 64).requires_grad_()
    layers.rms_norm(x, random(64), 1e-6).sum().backward()
    layers.silu_and_mul(x).sum().backward()
    assert x.grad is not None
    assert not layers.runs_fused(x)


def test_a_rotation_that_is_not_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="no fused rotation"):
        layers.rotate_in_place(random(2, 1, 48), random(2, 1, 48), random(2, 48), torch.arange(2))


class StandIns:
    """FlashInfer's functions, by name: bound to the installed signatures, checked as its C++ checks, computed here."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def module(self, name: str) -> Any:
        real = importlib.import_module(f"flashinfer.{name}")
        owner = self

        class Module:
            def __getattr__(self, function: str) -> Any:
                signature = inspect.signature(getattr(real, function))

                def call(*args: Any, **kwargs: Any) -> Any:
                    bound = signature.bind(*args, **kwargs).arguments
                    owner.calls.append(function)
                    return getattr(owner, function)(**bound)

                return call

        return Module()

    def rmsnorm(self, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert input.ndim in (2, 3)
        assert weight.ndim == 1
        assert input.shape[-1] == weight.shape[0]
        assert input.stride(-1) == weight.stride(0) == 1
        assert input.dtype == weight.dtype
        assert input.dtype in (torch.bfloat16, torch.float16)
        return normed(input, weight, eps).to(input.dtype)

    def gemma_rmsnorm(self, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert input.ndim == 2
        assert input.dtype == weight.dtype
        return normed(input, weight.double() + 1, eps).to(input.dtype)

    def fused_add_rmsnorm(self, input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        assert input.ndim == residual.ndim == 2
        assert input.is_contiguous()
        assert residual.is_contiguous()
        assert input.dtype == residual.dtype == weight.dtype
        total = input.double() + residual.double()
        residual.copy_(total)
        input.copy_(normed(total, weight, eps))

    def gemma_fused_add_rmsnorm(self, input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        assert weight.dtype == input.dtype
        self.fused_add_rmsnorm(input, residual, (weight.double() + 1).to(weight.dtype), eps)

    def silu_and_mul(self, input: Tensor) -> Tensor:
        assert input.is_contiguous()
        assert input.shape[-1] % 2 == 0
        return activated(input).to(input.dtype)

    def apply_rope_with_cos_sin_cache_inplace(
        self, positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool
    ) -> None:
        assert is_neox
        assert positions.shape == (len(query),)
        assert positions.is_contiguous()
        assert positions.dtype in (torch.int32, torch.int64)
        assert cos_sin_cache.dtype == torch.float32
        assert cos_sin_cache.ndim == 2
        assert cos_sin_cache.is_contiguous()
        assert head_size in (64, 128, 256, 512)
        assert query.dtype == key.dtype != torch.float32
        cosine, sine = cos_sin_cache[positions].chunk(2, dim=-1)
        for heads in (query, key):
            own = heads.view(len(heads), -1, head_size)  # must not copy
            own.copy_(rotated(own, cosine, sine))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    """On a card FlashInfer itself; elsewhere its stand-ins, whatever the device."""
    stand_ins = StandIns()
    if not ON_GPU:
        fused = layers.runs_fused

        class Cuda(Tensor):
            is_cuda = True

        monkeypatch.setenv("WHIFLASH_KERNELS", "auto")
        monkeypatch.setattr(layers, "runs_fused", lambda x: fused(x.as_subclass(Cuda)))
        monkeypatch.setattr(layers, "_flashinfer", stand_ins.module)
        monkeypatch.setattr(layers, "_compiles", lambda *_: True)
    return stand_ins


@needs_flashinfer
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@torch.no_grad()
def test_flashinfer_norms(flashinfer: StandIns, shape: tuple[int, ...], unit_offset: bool) -> None:
    wide = random(*shape[:-1], 100)[..., :64]  # rows, or heads, out of a wider projection
    x = wide if len(shape) < 4 else wide.contiguous()
    weight = random(64, dtype=torch.float32).to(torch.bfloat16)
    found = layers.rms_norm(x, weight, 1e-3, unit_offset=unit_offset)
    close(found, normed(x, weight.double() + unit_offset, 1e-3))
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert ON_GPU or flashinfer.calls == ["gemma_rmsnorm" if unit_offset else "rmsnorm"]


@needs_flashinfer
@pytest.mark.parametrize("unit_offset", [False, True])
@torch.no_grad()
def test_flashinfer_adds_and_norms(flashinfer: StandIns, unit_offset: bool) -> None:
    residual, x, weight = random(5, 64), random(5, 64).flip(0), random(64).abs() / 8
    added = residual.double() + x.double()
    total, found = layers.add_rms_norm(residual.clone(), x.clone(), weight, 1e-3, unit_offset=unit_offset)
    close(total, added)
    close(found, normed(added, weight.double() + unit_offset, 1e-3))
    assert ON_GPU or flashinfer.calls == ["gemma_fused_add_rmsnorm" if unit_offset else "fused_add_rmsnorm"], (
        "one launch"
    )


@pytest.mark.parametrize("unit_offset", [False, True])
def test_torch_adds_and_norms_and_leaves_what_it_was_given(unit_offset: bool) -> None:
    residual, x, weight = (random(*size, dtype=torch.float32) for size in ((5, 64), (5, 64), (64,)))
    kept = residual.clone(), x.clone()
    with running("torch"), torch.no_grad():
        total, found = layers.add_rms_norm(residual, x, weight, 1e-3, unit_offset=unit_offset)
    assert torch.equal(total, residual + x)
    close(found, normed(total, weight + unit_offset, 1e-3))
    assert torch.equal(residual, kept[0])
    assert torch.equal(x, kept[1])


@needs_flashinfer
@torch.no_grad()
def test_flashinfer_activates(flashinfer: StandIns) -> None:
    x = random(5, 96)
    close(layers.silu_and_mul(x), activated(x))
    close(layers.silu_and_mul(random(5, 200)[:, :96]), activated(random(5, 200)[:, :96]))
    assert ON_GPU or flashinfer.calls == ["silu_and_mul"] * 2


@needs_flashinfer
@pytest.mark.parametrize("width", [32, 64])
@torch.no_grad()
def test_flashinfer_rotates_a_projections_heads(flashinfer: StandIns, width: int) -> None:
    """Queries and keys as views of one projection: the values behind them stay."""
    qkv, angles = random(5, 4, 64), random(5, width // 2, dtype=torch.float32)
    q, k, v = torch.split(qkv.clone(), [2, 1, 1], dim=1)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    layers.rotate_in_place(q, k, table, torch.arange(5, device=DEVICE))
    close(q, rotated(qkv[:, :2], angles.cos(), angles.sin()))
    close(k, rotated(qkv[:, 2:3], angles.cos(), angles.sin()))
    assert torch.equal(v, qkv[:, 3:])
    assert ON_GPU or flashinfer.calls == ["apply_rope_with_cos_sin_cache_inplace"]


@needs_flashinfer
@torch.no_grad()
def test_32_bits_stay_with_torch(flashinfer: StandIns) -> None:
    x = random(5, 64, dtype=torch.float32)
    close(layers.rms_norm(x, x[0], 1e-6), normed(x, x[0], 1e-6))
    close(layers.silu_and_mul(x), activated(x))
    assert not layers.rotates_fused(x[:, None], 64)
    assert flashinfer.calls == []


@torch.no_grad()
def test_where_flashinfer_cannot_compile_torch_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried once, and the log says why."""
    asked = []

    def without_compiler(module: str) -> Any:
        asked.append(module)
        raise FileNotFoundError("nvcc is not there")

    monkeypatch.setattr(layers, "_flashinfer", without_compiler)
    layers._compiles.cache_clear()
    try:
        assert not any(layers._compiles(torch.bfloat16, torch.device("cpu")) for _ in range(3))
    finally:
        layers._compiles.cache_clear()
    assert asked == ["norm"]
    assert "nvcc is not there" in caplog.text
