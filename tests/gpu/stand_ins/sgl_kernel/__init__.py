"""Stand-ins for SGLang's compiled operators on a card that they are not installed for; the kit alone has them.

They keep to the signatures of `sgl_kernel` and FlashInfer. Each is one launch, so a pass has about as many as with the
real ones; how long it takes is another matter. `weak_ref_tensor` holds its tensor. Any other name may be imported, and
raises NotImplementedError when it is called, unless the kit has a module of that name.

`KIT_OPERATORS=own` in the environment leaves only those that nothing can be compiled for: SGLang compiles its own
operators at first use, with `nvcc`, and takes norms from the common operators that the kit brings.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl

for _name in ("quantization", "speculative", "kvcacheio"):
    sys.modules[f"sgl_kernel.{_name}"] = sys.modules[__name__]

__version__ = "0.4.10"  # SGLang asks for no older one
OWN = os.environ.get("KIT_OPERATORS") == "own"
NAMES = ("rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm", "silu_and_mul")


def __getattr__(name: str) -> Any:
    if name.startswith("__") or find_spec(f"{__name__}.{name}"):
        raise AttributeError(name)  # the import system then looks for the module

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

    return missing


@triton.jit
def _norm(x, residual, weight, out, stride, size, eps, add: tl.constexpr, unit: tl.constexpr, wide: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, wide)
    mask = at < size
    value = tl.load(x + row * stride + at, mask, 0.0).to(tl.float32)
    if add:
        value += tl.load(residual + row * size + at, mask, 0.0).to(tl.float32)
        tl.store(residual + row * size + at, value.to(residual.dtype.element_ty), mask)
    scale = tl.load(weight + at, mask, 0.0).to(tl.float32) + unit
    value *= tl.rsqrt(tl.sum(value * value) / size + eps) * scale
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), mask)


def _normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, out: torch.Tensor, eps: float, unit: int = 0
) -> torch.Tensor:
    rows, size = x.view(-1, x.shape[-1]) if x.is_contiguous() else x, x.shape[-1]
    if rows.ndim != 2:
        rows = rows.reshape(-1, size)
    if len(rows):
        wide = triton.next_power_of_2(size)
        others = (rows if residual is None else residual, weight, out, rows.stride(0), size, eps)
        _norm[(len(rows),)](rows, *others, add=residual is not None, unit=unit, wide=wide)
    return out


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return _normed(x, None, weight, torch.empty(x.shape, dtype=x.dtype, device=x.device), eps)


def gemma_rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return _normed(x, None, weight, torch.empty(x.shape, dtype=x.dtype, device=x.device), eps, unit=1)


def fused_add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    """The sum goes to `residual`, its norm to `x`."""
    _normed(x, residual, weight, x, eps)


def gemma_fused_add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    _normed(x, residual, weight, x, eps, unit=1)


@triton.jit
def _gated(x, out, size, wide: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * wide + tl.arange(0, wide)
    mask = at < size
    gate = tl.load(x + row * 2 * size + at, mask, 0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + at, mask, 0.0).to(tl.float32)
    tl.store(out + row * size + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask)


def silu_and_mul(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    size = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device) if out is None else out
    if rows := x.numel() // x.shape[-1]:
        _gated[(rows, triton.cdiv(size, 1024))](x, out, size, wide=1024)
    return out


@triton.jit
def _rotated(at, q, k, table, q_row, k_row, q_head, k_head, half, queries: tl.constexpr, wide: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, wide)
    mask = pair < half
    angles = table + tl.load(at + row).to(tl.int64) * 2 * half + pair
    cosine, sine = tl.load(angles, mask, 0.0).to(tl.float32), tl.load(angles + half, mask, 0.0).to(tl.float32)
    if head < queries:
        first = q + row * q_row + head * q_head + pair
    else:
        first = k + row * k_row + (head - queries) * k_head + pair
    a, b = tl.load(first, mask, 0.0).to(tl.float32), tl.load(first + half, mask, 0.0).to(tl.float32)
    tl.store(first, (a * cosine - b * sine).to(q.dtype.element_ty), mask)
    tl.store(first + half, (b * cosine + a * sine).to(q.dtype.element_ty), mask)


def rotate(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, *, is_neox: bool, **_: Any
) -> None:
    """In place, q and k [T, heads, size]; pairs are (i, i + half)."""
    assert is_neox, "no stand-in for interleaved pairs"
    if len(q):
        half, strides = cos_sin_cache.shape[-1] // 2, (q.stride(0), k.stride(0), q.stride(1), k.stride(1))
        heads = q.shape[1] + k.shape[1]
        wide = triton.next_power_of_2(half)
        arguments = (positions, q, k, cos_sin_cache, *strides, half)
        _rotated[(len(q), heads)](*arguments, queries=q.shape[1], wide=wide)


def rotate_flat(
    positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, size: int, table: torch.Tensor, is_neox: bool
) -> None:
    """As `rotate`, of q and k [T, heads * size]."""
    rotate(positions, q.view(len(q), -1, size), k.view(len(k), -1, size), table, is_neox=is_neox)


@triton.jit
def _kept(k, v, k_pool, v_pool, slots, k_row, v_row, size, wide: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, wide)
    mask, into = at < size, tl.load(slots + row).to(tl.int64) * size + at
    tl.store(k_pool + into, tl.load(k + row * k_row + at, mask), mask)
    tl.store(v_pool + into, tl.load(v + row * v_row + at, mask), mask)


def store(
    k: torch.Tensor, v: torch.Tensor, k_pool: torch.Tensor, v_pool: torch.Tensor, slots: torch.Tensor, **_: Any
) -> None:
    """Rows of equal width to their slots, k and v [T, size]."""
    if len(slots):
        size = k.shape[-1]
        arguments = (k, v, k_pool, v_pool, slots, k.stride(0), v.stride(0), size)
        _kept[(len(slots),)](*arguments, wide=triton.next_power_of_2(size))


def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def standing_in() -> Iterator[None]:
    """SGLang and the drafters' layers take these, and nothing that is compiled with `nvcc` or CUTLASS at first use."""
    from sglang.kernels.ops.attention import clamp_position, rope
    from sglang.srt.layers import activation
    from sglang.srt.layers.dual_gemm import DualGemm
    from sglang.srt.layers.rotary_embedding import base
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.models import utils
    from sglang.srt.speculative import dflash_worker_v2
    from whiflash_kernels import layers

    def for_drafters(positions: Any, q: Any, k: Any, _: int, table: Any, *, is_neox: bool) -> None:
        rotate(positions, q, k, table, is_neox=is_neox)

    flashinfer = SimpleNamespace(
        **{name: globals()[name] for name in NAMES}, apply_rope_with_cos_sin_cache_inplace=for_drafters
    )
    compiled: tuple[tuple[Any, str, Any], ...] = (
        (activation, "_jit_act_supported", lambda _: False),
        (clamp_position, "clamp_position_cuda", clamp_position._CLAMP_POSITION.forward_native),
        (base, "apply_rope_with_cos_sin_cache_inplace", rotate),
        (rope, "rotary_embedding", rotate_flat),
        (base.RotaryEmbedding, "try_bf16_rope_store", lambda *_, **__: None),
        (memory_pool, "can_use_store_cache", lambda *sizes: len(set(sizes)) == 1),
        (memory_pool, "store_cache", store),
        (utils, "can_use_fused_inplace_qknorm", lambda *_: False),
    )
    others: tuple[tuple[Any, str, Any], ...] = (
        # CUTLASS's and FlashInfer's operators.
        (DualGemm, "_select_mode", lambda *_: None),
        (dflash_worker_v2, "is_dflash_sampling_verify_available", lambda: False),
        (layers, "AVAILABLE", True),
        (layers, "_flashinfer", lambda _: flashinfer),
    )
    with ExitStack() as stack:
        for owner, name, value in others if OWN else (*compiled, *others):
            stack.enter_context(patch.object(owner, name, value))
        yield


if OWN:
    import_module("sgl_kernel.common_ops")
    globals().update({name: getattr(import_module("sgl_kernel.elementwise"), name) for name in NAMES})
