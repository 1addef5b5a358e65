"""Compiled norm, gated activation, rotation and KV write of decoder layers on a CPU: one call for a dozen of torch.

`layers.cpp` says what is computed and how. :mod:`whiflash_kernels.layers` calls it once a process has set it there.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.cpu import compiler

_SOURCE = Path(__file__).with_name("layers.cpp")
_FUNCTIONS = "norm:viplplpppiiff activate:viplpii rotate:iiiplliplliplpii keep:iplplplplpil"
_NORM, _ACTIVATION, _ROTATION, _KEEPING = map(compiler.profiled, ("norm", "silu_and_mul", "rotation", "keys_values"))
_KINDS = {torch.bfloat16: 0, torch.float32: 1}
_IN_MEMORY = (Tensor, torch.nn.Parameter)
"""Tensor types whose data pointer can be read; other subclasses may have no memory of their own."""


@dataclass(frozen=True, slots=True)
class CompiledLayers:
    """Calls the compiled functions. There is one per process and directory (:func:`compiled_layers`).

    Each takes tensors that :func:`fits` accepts, of one dtype, and raises ValueError if their shapes do not fit each
    other, because it would read beyond them. Results are new tensors, rounded once from float32.
    """

    library: ctypes.CDLL

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return sum = x + `added` (or x itself), and sum / rms(sum) * (weight + offset) from the unrounded sum.

        x, added: [..., size]. weight: [size], contiguous.
        """
        size = x.shape[-1]
        if weight.shape != (size,) or (added is not None and added.shape != x.shape):
            beside = "" if added is None else f" and {tuple(added.shape)}"
            raise ValueError(f"x {tuple(x.shape)}{beside} do not fit weight {tuple(weight.shape)}")
        rows = _rows(x)
        out = x.new_empty(x.shape)
        total, other = x, rows
        if added is not None:
            total, other = x.new_empty(x.shape), _rows(added)
        with _NORM:
            self.library.whiflash_norm(
                _KINDS[x.dtype],
                rows.data_ptr(),
                rows.stride(0),
                None if added is None else other.data_ptr(),
                other.stride(0),
                weight.data_ptr(),
                total.data_ptr(),
                out.data_ptr(),
                rows.shape[0],
                size,
                eps,
                offset,
            )
        return total, out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) * up of [gate | up], [..., 2 * size] → [..., size]."""
        size = gate_up.shape[-1] // 2
        rows = _rows(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
        with _ACTIVATION:
            self.library.whiflash_activate(
                _KINDS[gate_up.dtype], rows.data_ptr(), rows.stride(0), out.data_ptr(), rows.shape[0], size
            )
        return out

    def rotate(self, q: Tensor, k: Tensor, table: Tensor, rows: Tensor | None) -> None:
        """Turn pairs (i, i + R / 2) of heads in place: q and k [T, heads, D], by rows [T] int64 of `table` [N, R].

        table: of any dtype that :func:`fits` takes, contiguous. rows: None if T is N and row t uses the table's row t.
        Dimensions from R on stay.

        Raises:
            ValueError: also for a row number outside the table.
        """
        count, _, size = q.shape
        width = table.shape[1]
        if k.shape[::2] != (count, size) or width > size or width % 2 or not table.is_contiguous():
            raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit {width} dimensions")
        if len(table) != count if rows is None else rows.shape != (count,):
            raise ValueError(f"{count} rows do not fit a table of {len(table)}, or positions of its rows")
        rows = None if rows is None else rows.contiguous()
        with _ROTATION:
            done = self.library.whiflash_rotate(
                _KINDS[q.dtype],
                _KINDS[table.dtype],
                q.data_ptr(),
                q.stride(0),
                q.stride(1),
                q.shape[1],
                k.data_ptr(),
                k.stride(0),
                k.stride(1),
                k.shape[1],
                table.data_ptr(),
                len(table),
                None if rows is None else rows.data_ptr(),
                count,
                width // 2,
            )
        if not done:
            raise ValueError(f"positions reach beyond the table's {len(table)} rows")

    def keep(self, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> None:
        """Write rows k, v [T, ...] to `slots` [T] int64 of contiguous pools [S, ...].

        Raises ValueError if a row does not fill a slot, a pool is not contiguous, or a slot is outside the pools.
        """
        k, v = k.reshape(len(slots), -1), v.reshape(len(slots), -1)
        k_size, v_size = (pool.stride(0) * pool.element_size() for pool in (k_pool, v_pool))
        fitting = k.shape[1] == k_pool.stride(0) and v.shape[1] == v_pool.stride(0)
        if not (fitting and k_pool.is_contiguous() and v_pool.is_contiguous() and len(k_pool) == len(v_pool)):
            raise ValueError(
                f"rows of {k.shape[1]} and {v.shape[1]} do not fit pools {tuple(k_pool.shape)}, {tuple(v_pool.shape)}"
            )
        slots = slots.contiguous()
        with _KEEPING:
            done = self.library.whiflash_keep(
                k.data_ptr(),
                k.stride(0) * k.element_size(),
                k_pool.data_ptr(),
                k_size,
                v.data_ptr(),
                v.stride(0) * v.element_size(),
                v_pool.data_ptr(),
                v_size,
                slots.data_ptr(),
                len(slots),
                len(k_pool),
            )
        if not done:
            raise ValueError(f"slots reach beyond the pools' {len(k_pool)}")


def fits(*tensors: Tensor) -> bool:
    """Whether the functions take these together: bfloat16 or float32 in a CPU's memory, last dimensions contiguous."""
    dtype = tensors[0].dtype
    if dtype not in _KINDS:
        return False
    for x in tensors:
        if x.dtype != dtype or type(x) not in _IN_MEMORY or x.device.type != "cpu" or x.stride(-1) != 1:
            return False
    return True


def _rows(x: Tensor) -> Tensor:
    """View [..., size] as [T, size]; it is copied if rows are not evenly spaced."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


@cache
def compiled_layers(directory: Path) -> CompiledLayers:
    """Compile norm, activation, rotation and KV write into `directory`, or load them, and check them against torch.

    Raises:
        OSError: they cannot be compiled or loaded, do not share torch's threads, or compute something else.
    """
    library = compiler.load(_SOURCE, directory, ["-fopenmp", "-Wno-psabi"], _FUNCTIONS)
    return compiler.checked(library, CompiledLayers(library), _agrees)


def _agrees(layers: CompiledLayers) -> bool:
    """Whether a few small tensors come out as torch's, to float32's rounding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, added, weight = normal(3, 100), normal(3, 100), normal(100)
    total, normed = layers.norm(x, weight, 1e-5, 1.0, added)
    heads, table = normal(3, 2, 48), normal(3, 40)
    first, second = heads[..., :20], heads[..., 20:40]
    cosine, sine = table[:, None, :20], table[:, None, 20:]
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine, heads[..., 40:]], -1)
    layers.rotate(heads, heads[:, :0], table, None)
    pairs = (
        (total, x + added),
        (normed, F.rms_norm(x + added, (100,), weight + 1.0, 1e-5)),
        (layers.silu_and_mul(x), F.silu(x[:, :50]) * x[:, 50:]),
        (heads, turned),
    )
    return all(torch.allclose(result, expected, rtol=1e-4, atol=1e-5) for result, expected in pairs)
