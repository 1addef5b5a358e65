"""Stock SGLang on the phantom card: what its kernels and the driver would do is done by stand-ins; all else is its own.

SGLang asks for a card while it is imported, so a process enters `phantom` and `driver` before that, with
`ENVIRONMENT`. The stand-ins are

- the driver's library, without which SGLang's compiled operators cannot be loaded: all of its functions fail;
- FA3 and SGLang's Triton attention, by a formula; SGLang's other Triton kernels, by Triton's interpreter;
- fused operators (norms, rotation, activations), by SGLang's own PyTorch implementations of them;
- kernels that are compiled with `nvcc` or CUTLASS when they are first wanted: none can be, and SGLang does without;
- NCCL, by gloo, for the one process that there is; and inference mode, in which nobody can wrap a tensor.
"""

import contextlib
import ctypes
import inspect
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from launches import Launches, compiled_for, kernels_taken
from streams import Streams
from torch import distributed

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
    "SGLANG_CRASH_ON_JIT_COMPILE": "1",
}
DRIVER = (
    *("cuCtxFromGreenCtx", "cuCtxPopCurrent_v2", "cuCtxPushCurrent_v2", "cuDevResourceGenerateDesc"),
    *("cuDevSmResourceSplitByCount", "cuDeviceGetDevResource", "cuDriverGetVersion", "cuGetErrorString"),
    *("cuGetProcAddress_v2", "cuGreenCtxCreate", "cuGreenCtxDestroy", "cuGreenCtxGetDevResource"),
    *("cuPointerGetAttribute", "cuStreamCreate"),
)
"""Functions of `libcuda.so.1` that SGLang's compiled operators are linked to."""
NO_DEVICE = 100
"""CUDA's error that there is no device."""


def driver(directory: Path) -> None:
    """Load a `libcuda.so.1` whose functions all fail; it is built in the directory by the C compiler `cc`."""
    source, library = directory / "driver.c", directory / "libcuda.so.1"
    source.write_text("\n".join(f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in DRIVER))
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextlib.contextmanager
def sglang_on_card(world: Streams) -> Iterator[Launches]:
    """SGLang can start and serve here. Yields its launches."""
    from sgl_kernel import flash_attn
    from sglang.kernels import fused_op
    from sglang.kernels.ops.attention import extend_attention, flash_attention_v3
    from sglang.kernels.spec import KernelBackend
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.dual_gemm import DualGemm
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, interpreter_builder

    fused_op.set_fused_op_backend(KernelBackend.TORCH)
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(kernels_taken(world))
        interpret = GridExecutor.__call__

        def interpreted(self: Any, *args: Any, **kwargs: Any) -> None:
            launches.of(self.fn.__name__, partial(interpret, self), *args, **kwargs)

        run = InterpretedFunction.run

        def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            launches.compiled.add(compiled_for(self, args, kwargs))
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        store = interpreter_builder.create_masked_store

        def noted(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            launches.stored.append(pointers.data[mask.data.astype(bool)].astype("int64"))
            return store(pointers, value, mask, *rest)

        order = list(inspect.signature(inspect.unwrap(flash_attention_v3.flash_attn_with_kvcache)).parameters)

        def fa3(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(order, args, strict=False)) | kwargs
            into = given.pop("out", None)
            of_lse = given.pop("return_softmax_lse")
            out, lse = launches.of("fa3", attend, **{name: given[name] for name in ATTENDED})
            if into is not None:
                out = into.copy_(out.view_as(into))
            return (out, lse) if of_lse else out

        def planned(batch_size: int, *, cache_seqlens: Any, **_: Any) -> Any:
            return launches.of("plan of fa3", lambda lengths: lengths.new_zeros(4 * batch_size + 1), cache_seqlens)

        for owner, name, stand_in in (
            (flash_attn, "get_scheduler_metadata", planned),
            (GridExecutor, "__call__", interpreted),
            (InterpretedFunction, "run", compiled),
            (interpreter_builder, "create_masked_store", noted),
            (flash_attention_v3, "_load_fa3_kernels", lambda: {"flash_attn_with_kvcache": fa3}),
            (extend_attention, "extend_attention_fwd", partial(launches.of, "extend_attention_fwd", extend)),
            (DualGemm, "_select_mode", lambda *_: None),
            (deep_gemm_wrapper, "update_deep_gemm_config", lambda *_: None),
            (torch, "inference_mode", lambda mode=True: torch.no_grad()),
            (distributed, "init_process_group", _over_gloo(distributed.init_process_group)),
            (distributed, "new_group", _over_gloo(distributed.new_group)),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield launches


ATTENDED = (
    *("q", "k_cache", "v_cache", "cache_seqlens", "page_table", "cu_seqlens_q"),
    *("max_seqlen_q", "softmax_scale", "causal", "window_size"),
)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """FA3's attention over pages.

    Args:
        q: [rows, heads, size], packed. k_cache, v_cache: [pages, page, heads of K and V, size].
        cache_seqlens: [requests] int32, tokens of each, the rows' own included. page_table: [requests, most] int32.
        cu_seqlens_q: [requests + 1] int32. max_seqlen_q: most rows of a request; further ones FA3 leaves out.

    Returns:
        Outputs as `q`, and [heads, rows] float32, the log of the sum of exponents.
    """
    out, lse = (torch.zeros(*q.shape[:2], v_cache.shape[-1], dtype=q.dtype), torch.zeros(q.shape[1], q.shape[0]))
    keys, values = (cache.flatten(0, 1).float() for cache in (k_cache, v_cache))
    page, group, bounds = k_cache.shape[1], q.shape[1] // k_cache.shape[2], cu_seqlens_q.tolist()
    for i, length in enumerate(cache_seqlens.tolist()):
        rows = slice(bounds[i], min(bounds[i + 1], bounds[i] + max_seqlen_q))
        count = rows.stop - rows.start
        if not count:
            continue
        at = torch.arange(length)
        slots = page_table[i].long()[at // page] * page + at % page
        own = torch.arange(count)[:, None] + length - (bounds[i + 1] - bounds[i])
        hidden = (at > own) if causal else torch.zeros(count, length, dtype=torch.bool)
        if window_size[0] >= 0:
            hidden = hidden | (at < own - window_size[0])
        k, v = (cache[slots].repeat_interleave(group, 1) for cache in (keys, values))
        mixed, lse[:, rows] = _mixed(q[rows], k, v, hidden, softmax_scale or q.shape[-1] ** -0.5)
        out[rows] = mixed.to(out.dtype)
    return out, lse


def extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    custom_mask: None,
    causal: bool,
    mask_indptr: Any,
    most: int,
    k_scale: float,
    v_scale: float,
    sm_scale: float,
    **_: Any,
) -> None:
    """SGLang's Triton attention, `extend_attention_fwd`, of rows behind what is in the pool.

    Args:
        q, out: [rows, heads, size], packed; k, v: of the same rows. k_buffer, v_buffer: [slots, heads of K, size].
        qo_indptr, kv_indptr: [requests + 1], where rows and slots of each request begin. kv_indices: slots of the text
            in front of the rows. most: rows of a request; further ones the kernel leaves out.
    """
    assert custom_mask is None
    assert causal
    group, bounds, begins = q.shape[1] // k.shape[1], qo_indptr.tolist(), kv_indptr.tolist()
    for i in range(len(bounds) - 1):
        rows = slice(bounds[i], min(bounds[i + 1], bounds[i] + most))
        slots = kv_indices[begins[i] : begins[i + 1]].long()
        count = rows.stop - rows.start
        if count < 1:
            continue
        keys, values = (
            torch.cat([buffer[slots], own[rows]]).float().repeat_interleave(group, 1)
            for buffer, own in ((k_buffer, k), (v_buffer, v))
        )
        hidden = torch.arange(len(keys)) > torch.arange(count)[:, None] + len(slots)
        out[rows] = _mixed(q[rows], keys, values, hidden, sm_scale)[0].to(out.dtype)


def _mixed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, heads, size] that queries see, and the logs of their sums of exponents [heads, rows]."""
    scores = (torch.einsum("qhd,khd->hqk", q.float(), k) * scale).masked_fill_(hidden, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)


def _over_gloo(make: Any) -> Any:
    """The function that makes groups of processes, which takes the name of a backend."""

    def made(*args: Any, **kwargs: Any) -> Any:
        if "nccl" in str(kwargs.get("backend")):
            kwargs["backend"] = "gloo"
        return make(*("gloo" if arg == "nccl" else arg for arg in args), **kwargs)

    return made
