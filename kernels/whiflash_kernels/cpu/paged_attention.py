"""Compiled attention over a paged KV pool on a CPU, read in place: no gathered copies, no masks, one call per layer.

`paged_attention.cpp` says what is computed and how. It takes bfloat16, and every layout that
:class:`whiflash_kernels.reference.paged_attention.PagedAttentionPlan` takes.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from whiflash_kernels.cpu import compiler
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan, check_lengths

_SOURCE = Path(__file__).with_name("paged_attention.cpp")
_PROFILED = compiler.profiled("attention")


class _Layout(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("table", "starts", "lengths", "rows")]
        + [(name, ctypes.c_int64) for name in ("table_row", "q_row", "k_slot", "k_head", "v_slot", "v_head")]
        + [(name, ctypes.c_int32) for name in ("requests", "heads", "kv_heads", "size", "v_size", "causal", "window")]
        + [("scale", ctypes.c_float)]
    )


class _Tensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("out", "q", "k", "v", "sinks")]


@dataclass(frozen=True, slots=True)
class CompiledAttention:
    """Calls the compiled kernel. There is one per process and directory (:func:`compiled_attention`)."""

    library: ctypes.CDLL

    def plan(
        self,
        slot_table: Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        causal: bool,
        request_rows: Tensor | None = None,
        window: int | None = None,
    ) -> "CompiledPlan":
        """Plan one forward's batch; arguments and errors are those of `PagedAttentionPlan.build`.

        `slot_table` is read when layers run, so it must not change before they have.
        """
        check_lengths(slot_table, q_lens, kv_lens, causal)
        rows = torch.arange(len(q_lens)) if request_rows is None else request_rows.to(torch.int64).contiguous()
        return CompiledPlan(
            self.library,
            slot_table.int().contiguous(),
            torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32),
            torch.tensor(list(kv_lens), dtype=torch.int32),
            rows,
            sum(q_lens),
            causal,
            -1 if window is None or not causal else window,
        )

    def draft(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        req_to_token: Tensor,
        request_slots: Tensor,
        seq_lens: Tensor,
        extra: int,
        width: int,
        causal: bool,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Compute `whiflash_kernels.attention.draft_attention` for tensors that :func:`fits` accepts."""
        requests = len(request_slots)
        plan = CompiledPlan(
            self.library,
            req_to_token.int(),
            torch.arange(0, (requests + 1) * width, width, dtype=torch.int32),
            (seq_lens + extra).int(),
            request_slots.to(torch.int64).contiguous(),
            requests * width,
            causal,
            -1 if window is None else window,
        )
        return plan.run(q, k, v, scale)


@dataclass(frozen=True, slots=True)
class CompiledPlan:
    """Everything of one forward's attention that does not depend on the layer. Build once, run per layer."""

    library: ctypes.CDLL
    slot_table: Tensor  # [R, C] int32
    starts: Tensor  # [bs + 1] int32
    lengths: Tensor  # [bs] int32
    rows: Tensor  # [bs] int64
    num_rows: int
    causal: bool
    window: int  # -1: none

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        """Compute one layer's attention; arguments are those of `PagedAttentionPlan.run`, all bfloat16.

        q: [T, Hq, D], heads and dimensions contiguous, or it is copied. k_cache, v_cache: [S, Hkv, D or Dv], dimensions
        contiguous. Returns [T, Hq, Dv] bfloat16, a new tensor.

        Raises:
            ValueError: shapes that do not fit each other or the plan; the kernel would read beyond them.
        """
        self._check(q, k_cache, v_cache, sinks)
        if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
            q = q.contiguous()
        out = q.new_empty(self.num_rows, q.shape[1], v_cache.shape[2])
        if sinks is not None:
            sinks = sinks.float().contiguous()
        layout = _Layout(
            self.slot_table.data_ptr(),
            self.starts.data_ptr(),
            self.lengths.data_ptr(),
            self.rows.data_ptr(),
            self.slot_table.stride(0),
            q.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            v_cache.stride(0),
            v_cache.stride(1),
            len(self.lengths),
            q.shape[1],
            k_cache.shape[1],
            q.shape[2],
            v_cache.shape[2],
            self.causal,
            self.window,
            scale,
        )
        tensors = _Tensors(
            out.data_ptr(),
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
        )
        with _PROFILED:
            self.library.whiflash_paged_attention(ctypes.byref(layout), ctypes.byref(tensors))
        return out

    def _check(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None) -> None:
        (rows, heads, size), (slots, kv_heads, k_size) = q.shape, k_cache.shape
        if rows != self.num_rows or size != k_size or v_cache.shape[:2] != (slots, kv_heads):
            raise ValueError(
                f"q {tuple(q.shape)}, keys {tuple(k_cache.shape)} and values {tuple(v_cache.shape)} do not fit "
                f"each other or {self.num_rows} rows"
            )
        if heads % kv_heads or (sinks is not None and sinks.shape != (heads,)):
            beside = "" if sinks is None else f" or sinks {tuple(sinks.shape)}"
            raise ValueError(f"{heads} heads do not fit {kv_heads} KV heads{beside}")


def fits(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the kernel takes these: bfloat16 on a CPU, even head sizes, values' a multiple of 16."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (q, k_cache, v_cache))
        and k_cache.stride(2) == v_cache.stride(2) == 1
        and q.shape[2] % 2 == 0
        and v_cache.shape[2] % 16 == 0
    )


@cache
def compiled_attention(directory: Path) -> CompiledAttention:
    """Compile the kernel into `directory`, or load it from there, and check that it agrees with torch.

    Raises:
        OSError: it cannot be compiled or loaded, does not share torch's threads, or computes something else.
    """
    library = compiler.load(_SOURCE, directory, ["-fopenmp"])
    library.whiflash_paged_attention.restype = None
    return compiler.checked(library, CompiledAttention(library), _agrees)


def _agrees(attention: CompiledAttention) -> bool:
    """Whether a few small batches give the reference's results up to bfloat16's rounding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    table = torch.randperm(700, generator=generator).int()[None].expand(3, -1).contiguous()
    for heads, kv_heads, size in ((3, 1, 64), (4, 2, 48)):
        lengths, widths = [70, 7, 690], [70, 1, 5]
        q, k, v = normal(76, heads, size), normal(700, kv_heads, size), normal(700, kv_heads, size)
        ours = attention.plan(table, widths, lengths, causal=True)
        plain = PagedAttentionPlan.build(table, widths, lengths, causal=True)
        expected = plain.run(q.float(), k.float(), v.float(), size**-0.5)
        if not torch.allclose(ours.run(q, k, v, size**-0.5).float(), expected, rtol=0.02, atol=0.02):
            return False
    return True
