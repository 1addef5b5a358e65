"""Norm, gated activation and rotation of a decoder layer, by FlashInfer on CUDA, by compiled functions on a CPU if a
process has set them with :func:`use`, else by torch.

FlashInfer is imported when one of its kernels is first needed. It compiles some of them then, with CUDA's compiler. If
one cannot be compiled, torch runs and a warning is logged. FlashInfer takes 16-bit tensors, the compiled functions
bfloat16 and float32. Neither computes gradients, so torch runs while gradients are recorded.
"""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.cpu.layers import CompiledLayers, fits
from whiflash_kernels.dispatch import backend_for

logger = logging.getLogger("whiflash_kernels")

AVAILABLE = find_spec("flashinfer") is not None
ROTATED_HEADS = (64, 128, 256, 512)
ROTARY_WIDTHS = (16, 32, 64, 128, 256)
"""Sizes of heads, and widths of their rotated part, that FlashInfer's rotation is compiled for."""

_compiled: CompiledLayers | None = None


def use(layers: CompiledLayers | None) -> None:
    """Compute layers on this CPU by `layers`; None: by torch."""
    global _compiled
    _compiled = layers


def compiled_for(*tensors: Tensor) -> CompiledLayers | None:
    """Return the layers set by :func:`use` if they take all of these tensors together, else None: torch runs.

    Torch also runs under a dispatch mode, which records or replaces operators and would miss the compiled call.
    """
    unseen = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack()
    if _compiled is None or unseen or not fits(*tensors):
        return None
    return _compiled


@cache
def _flashinfer(module: str) -> Any:
    return import_module(f"flashinfer.{module}")


@cache
def _compiles(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every FlashInfer kernel that this module calls runs on `device`, tried once on a few numbers."""
    rows = torch.ones(2, 64, dtype=dtype, device=device)
    heads, at = rows[:, None].clone(), torch.zeros(2, dtype=torch.int64, device=device)
    try:
        norm = _flashinfer("norm")
        norm.rmsnorm(rows, rows[0], 1e-6)
        norm.fused_add_rmsnorm(rows.clone(), rows.clone(), rows[0], 1e-6)
        _flashinfer("activation").silu_and_mul(rows)
        table = torch.ones(2, 64, dtype=torch.float32, device=device)
        _flashinfer("rope").apply_rope_with_cos_sin_cache_inplace(at, heads, heads.clone(), 64, table, is_neox=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        logger.warning(
            "FlashInfer's kernels for drafters' layers cannot be had (%s: %s). Torch runs them, which is slower; "
            "install CUDA's compiler and set CUDA_HOME.",
            type(error).__name__,
            str(error).partition("\n")[0][:200],
        )
        return False
    return True


def runs_fused(x: Tensor) -> bool:
    """Whether FlashInfer's kernels serve ``x``: on CUDA, of 16 bits, without gradients, where it works."""
    return (
        AVAILABLE
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and not torch.is_grad_enabled()
        and backend_for(x) == "triton"
        and _compiles(x.dtype, x.device)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Return x / sqrt(mean(x ** 2) + eps) * weight over the last dimension, or * (1 + weight) with ``unit_offset``.

    Args:
        x: [..., size] float; last dimension contiguous. weight: [size] float.

    Returns:
        [..., size] in x's dtype, new.

    Grid: FlashInfer's, one launch. Numerics: float32 inside; without ``unit_offset`` torch's weight is rounded to x's
    dtype first, which the checkpoint has anyway.
    Fallback: a CPU's compiled norm, else `torch.nn.functional.rms_norm`.
    Compared: the same kernels as SGLang's layers use where FlashInfer serves them.
    Source: RMSNorm, arXiv 1910.07467; FlashInfer's ``norm``.
    """
    if runs_fused(x):
        norm = _flashinfer("norm")
        kernel = norm.gemma_rmsnorm if unit_offset else norm.rmsnorm
        # FlashInfer's kernels take rows with any strides; only its CuTe kernels take Gemma's norm of [T, heads, size].
        rows = x if x.ndim == 2 or (x.ndim == 3 and not unit_offset) else x.reshape(-1, x.shape[-1])
        normed: Tensor = kernel(rows, weight.to(x.dtype), eps)
        return normed.view(x.shape)
    if compiled := compiled_for(x, weight):
        return compiled.norm(x, weight, eps, float(unit_offset))[1]
    if unit_offset:
        return F.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def add_rms_norm(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """Return residual + x and `rms_norm` of the sum.

    Args:
        residual, x: [T, size] float of one dtype, contiguous; both may be overwritten by the results.
        weight, eps, unit_offset: see `rms_norm`.

    Returns:
        The sum and its norm, [T, size] each.

    Grid: FlashInfer's, one launch. Numerics: float32 inside; kernels norm the sum before rounding it, torch after.
    Fallback: a CPU's compiled norm, else torch; both leave the arguments unchanged.
    Source: see `rms_norm`.
    """
    if runs_fused(x) and x.is_contiguous() and residual.is_contiguous():
        norm = _flashinfer("norm")
        kernel = norm.gemma_fused_add_rmsnorm if unit_offset else norm.fused_add_rmsnorm
        kernel(x, residual, weight.to(x.dtype), eps)
        return residual, x
    if compiled := compiled_for(x, residual, weight):
        return compiled.norm(x, weight, eps, float(unit_offset), residual)
    total = residual + x
    return total, rms_norm(total, weight, eps, unit_offset=unit_offset)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of [gate | up].

    Args:
        gate_up: [T, 2 * size] float.

    Returns:
        [T, size] in the same dtype, new.

    Grid: FlashInfer's, one launch. Numerics: float32 inside; torch rounds silu(gate) before the product.
    Fallback: a CPU's compiled activation, else torch.
    Source: SwiGLU, arXiv 2002.05202; FlashInfer's ``activation``.
    """
    if runs_fused(gate_up):
        activated: Tensor = _flashinfer("activation").silu_and_mul(gate_up.contiguous())
        return activated
    if compiled := compiled_for(gate_up):
        return compiled.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotates_fused(q: Tensor, width: int) -> bool:
    """Whether `rotate_in_place` serves heads ``q`` [T, H, D] of which ``width`` dimensions rotate."""
    if compiled_for(q):
        return True
    return runs_fused(q) and q.shape[-1] in ROTATED_HEADS and width in ROTARY_WIDTHS


def rotate_in_place(q: Tensor, k: Tensor, table: Tensor, rows: Tensor | None) -> None:
    """Rotate queries and keys in half-split (NeoX) layout: pair i of a head is (i, i + R / 2), i < R / 2.

    With (a, b) a pair of row t, and [cosine | sine] = table[rows[t]]: a * cosine[i] - b * sine[i] and
    b * cosine[i] + a * sine[i]; dimensions from R on stay.

    Args:
        q, k: [T, Hq, D] and [T, Hkv, D], last dimension contiguous; written in place.
        table: [N, R] float32, contiguous. rows: [T] int64; None, on a CPU: 0 … T-1.

    Raises:
        ValueError: if `rotates_fused` is False, which a caller with a fallback checks before.

    Grid: FlashInfer's, one launch, or a CPU's compiled rotation. Numerics: float32 inside.
    Fallback: the caller's; torch rotates out of place.
    Source: RoPE, arXiv 2104.09864; FlashInfer's ``rope``.
    """
    if not rotates_fused(q, table.shape[-1]):
        raise ValueError(f"no fused rotation for {q.dtype} heads of {q.shape[-1]} on {q.device}")
    if compiled := compiled_for(q, k):
        compiled.rotate(q, k, table, rows)
        return
    _flashinfer("rope").apply_rope_with_cos_sin_cache_inplace(rows, q, k, q.shape[-1], table, is_neox=True)


def write_rows(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> None:
    """Write K and V to their slots: k_pool[slots] = k, v_pool[slots] = v.

    Args:
        k, v: [T, Hkv, D] each, or with equally many numbers per row, in the dtype of their pool. k_pool, v_pool: [S,
            Hkv, D], contiguous.
        slots: [T] int64, pairwise different, except for a slot that is never read.

    Numerics: copies. Fallback: a CPU's compiled copy, else torch.
    """
    compiled = compiled_for(k, v, k_pool, v_pool)
    if compiled and slots.dtype == torch.int64:
        compiled.keep(k, v, k_pool, v_pool, slots)
        return
    # index_copy_ skips the broadcasting machinery of `pool[slots] = rows`.
    k_pool.index_copy_(0, slots, k.view(-1, *k_pool.shape[1:]))
    v_pool.index_copy_(0, slots, v.view(-1, *v_pool.shape[1:]))
