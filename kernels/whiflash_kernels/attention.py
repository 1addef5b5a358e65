"""Attention of a drafter's few query rows over its paged KV; lengths are read on the device only."""

from typing import Any

import torch
from torch import Tensor

from whiflash_kernels.cpu.paged_attention import CompiledAttention, fits
from whiflash_kernels.reference import attention as reference

_compiled: CompiledAttention | None = None


def use(attention: CompiledAttention | None) -> None:
    """Let `draft_attention` attend by a kernel compiled for this CPU, where it fits; None: by torch."""
    global _compiled
    _compiled = attention


def draft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    req_to_token: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    *,
    extra: int,
    width: int,
    causal: bool,
    scale: float,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """Compute attention of ``width`` query rows per request over its paged KV, the rows' own K and V included.

    Request b has e = seq_lens[b] + extra entries, the last ``width`` of them its own rows'; its row i is at
    p = e - width + i. With G = Hq // Hkv:

        out[b * width + i, h] = sum_j softmax_j(scale * q[b * width + i, h] . K[s(j), h // G]) V[s(j), h // G]

    over the entries j that the row sees, s(j) = req_to_token[request_slots[b], j]: 0 <= j <= p with ``causal`` (a
    chain step, EAGLE-3), else 0 <= j < e (a block, DFlash); with ``window`` only j >= p - window of these.

    Args:
        q: [B * width, Hq, D] float, request after request; last dimension contiguous.
        k, v: [S, Hkv, D], q's dtype or 8-bit floats; last dimension contiguous. The rows' own K and V are there.
        req_to_token: [slots, context] int32 (or int64), last dimension contiguous.
        request_slots: [B] int64 or int32; one request may be given as several of ``width`` 1, as in a catch-up.
        seq_lens: [B] int64 or int32. A request with e <= 0 is padding.
        extra: entries beyond ``seq_lens``: ``width`` where the rows follow the context, one more for every step
            of a chain, so that all steps share ``seq_lens``.
        width: rows of every request, at least 1.
        window: entries before its own that a row sees; None: all.
        longest: most entries that a request may have, as the host knows it; None: the context. It sizes launches, so
            a captured one keeps it.

    Returns:
        [B * width, Hq, D] in q's dtype, contiguous, new. A row that sees nothing is 0.

    Raises:
        ValueError: shapes that do not fit each other, or ``width`` below 1.

    Grid: (row tiles * Hkv, B + shares - 1). Every program counts from ``seq_lens`` into how many shares each request's
    entries are cut, takes one, or ends; a second launch merges the shares of requests that are cut. Both are
    graph-capturable: the grid depends on the batch's shape and the context's bound alone.
    Numerics: scores, softmax and sums in float32; for 16-bit inputs the weights are rounded to them before the
    second product, as flash attention does.
    Fallback: on a CPU the kernel that is in :func:`use`; else torch gathers K and V and runs its scaled-dot-product
    attention; on a GPU for ``longest`` entries of every request. One operator of torch, ``whiflash::draft_attention``,
    so that fake tensors and dispatch modes see one call, whatever runs inside.
    Compared: SGLang's Triton decode attention takes one row a request, its extend attention host-planned index
    lists; FlashInfer's paged prefill plans on the host.
    Source: flash attention's online softmax, arXiv 2205.14135; splits, arXiv 2311.01282.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    requests = request_slots.shape[0]
    if q.ndim != 3 or q.shape[0] != requests * width or seq_lens.shape != (requests,):
        raise ValueError(
            f"q must be [{requests} * {width}, Hq, D] and seq_lens [{requests}], "
            f"got {tuple(q.shape)} and {tuple(seq_lens.shape)}"
        )
    if k.ndim != 3 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k and v must both be [S, Hkv, {q.shape[2]}] with Hkv dividing {q.shape[1]}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v, req_to_token)):
        raise ValueError("the last dimensions of q, k, v and req_to_token must be contiguous")
    longest = req_to_token.shape[1] if longest is None else min(longest, req_to_token.shape[1])
    out: Tensor = torch.ops.whiflash.draft_attention(
        q, k, v, req_to_token, request_slots, seq_lens, extra, width, causal, scale, window, longest
    )
    return out


def _draft_attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    if _compiled is not None and fits(q, k, v):
        return _compiled.draft(q, k, v, *others[:-1])  # without `longest`, which sizes launches
    return reference.draft_attention(q, k, v, *others)


# `torch.library.custom_op` would do the same and take five times as long a call.
_library = torch.library.Library("whiflash", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "draft_attention(Tensor q, Tensor k, Tensor v, Tensor req_to_token, Tensor request_slots, Tensor seq_lens, "
    "int extra, int width, bool causal, float scale, int? window, int longest) -> Tensor"
)
_library.impl("draft_attention", _draft_attention, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("whiflash::draft_attention", lambda q, *_: q.new_empty(q.shape), lib=_library)
