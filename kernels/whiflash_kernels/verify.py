"""Attention of a verification's packed rows over their requests' paged prefixes, with a width per request."""

from typing import Any

import torch
from torch import Tensor

from whiflash_kernels import dispatch

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes that a KV pool may have, besides that of q."""


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    *,
    most: int,
    sinks: Tensor | None = None,
    **_: object,
) -> None:
    if most < 1:
        raise ValueError(f"most must be 1 or more, got {most}")
    if q.ndim != 3 or out.shape != q.shape or not out.is_contiguous():
        raise ValueError(f"q must be [T, Hq, D] and out the same, contiguous, got {q.shape} and {out.shape}")
    if k.ndim != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k and v must be [{q.shape[0]}, Hkv, {q.shape[2]}] with Hkv dividing {q.shape[1]}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for pool in (k_pool, v_pool):
        if pool.shape[1:] != k.shape[1:] or pool.dtype not in (q.dtype, *EIGHT_BITS):
            raise ValueError(
                f"pools must be [S, {k.shape[1]}, {k.shape[2]}] in {q.dtype} or 8 bits, "
                f"got {tuple(pool.shape)} in {pool.dtype}"
            )
    if not 0 < len(qo_indptr) <= len(kv_indptr):
        raise ValueError(f"qo_indptr must be [B + 1], got {len(qo_indptr)}, for {len(kv_indptr)} of kv_indptr")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks must be [{q.shape[1]}], got {tuple(sinks.shape)}")
    if any(tensor.stride(-1) != 1 for tensor in (q, k, v, k_pool, v_pool, qo_indptr, kv_indptr, kv_indices)):
        raise ValueError("the last dimension of every tensor must be contiguous")


@dispatch.op(_check)
def verify_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    *,
    most: int,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    plans: dict[Any, Any] | None = None,
) -> None:
    """Compute attention of each request's rows over its prefix in the pools and, causally, over these rows.

    Request b has the rows t of qo_indptr[b] to qo_indptr[b + 1], and n = kv_indptr[b + 1] - kv_indptr[b] entries of its
    prefix. Its keys are k_scale * k_pool[kv_indices[kv_indptr[b] + j]] for 0 <= j < n, then k of its rows; its values
    likewise. With G = Hq // Hkv and i = t - qo_indptr[b]:

        out[t, h] = sum_j p_j V[j, h // G],   p = softmax_j(s(scale * q[t, h] . K[j, h // G])) over j <= n + i,

    where s(x) = cap * tanh(x / cap) with a ``cap``, else x; with a ``window`` only j >= n + i - window; with ``sinks``
    the softmax has one more score, sinks[h], which has no value.

    Args:
        q: [T, Hq, D] float. k, v: [T, Hkv, D], q's dtype: of the rows themselves.
        out: [T, Hq, D], written in place; padding rows are not written.
        k_pool, v_pool: [S, Hkv, D], q's dtype or 8-bit floats, which ``k_scale`` and ``v_scale`` multiply.
        qo_indptr, kv_indptr: [B + 1] int64 or int32, ascending. A request without rows is padding. Further entries of
            kv_indptr are not read.
        kv_indices: [N] int64 or int32 slots of the prefixes. With a window each request's last ones suffice, at least
            ``window``.
        most: rows of a request at most; further ones are left out. It sizes the launches, so a captured one keeps it.
        window: keys before its own that a row sees; None: all. cap: 0 for none.
        sinks: [Hq] float.
        plans: layers of one forward share it, empty before the first: layers of a kind divide keys in the same way.

    The last dimension of every tensor is contiguous.

    Triton: (tiles of rows * Hkv) x shares programs, which run at once and read equally many keys each, of whichever
    requests. The query heads of a KV head and the rows of a request are rows of one tile, so its keys are read once.
    One launch a forward plans that, a second one a layer merges the requests that are cut. Scores, weights and sums are
    float32, the products' operands have q's dtype; the order of summation depends on the lengths of the whole batch.
    torch (CPU, ``WHIFLASH_KERNELS=torch``): one request after the other, which reads lengths.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or ``most`` below 1.

    Source: equal shares of all work as Stream-K (Osama et al., 2023); merging as Flash-Decoding (Dao et al., 2023); the
    inputs are those of SGLang's `extend_attention_fwd`.
    """
    bounds, begins, kv_heads = qo_indptr.tolist(), kv_indptr.tolist(), k.shape[1]
    for request in range(len(bounds) - 1):
        rows = slice(bounds[request], min(bounds[request + 1], bounds[request] + most))
        slots = kv_indices[begins[request] : begins[request + 1]].long()
        turn = torch.arange(rows.stop - rows.start, device=q.device)
        keys = torch.cat((k_pool[slots].float() * k_scale, k[rows].float()))
        values = torch.cat((v_pool[slots].float() * v_scale, v[rows].float()))
        queries = q[rows].float().reshape(len(turn), kv_heads, q.shape[1] // kv_heads, q.shape[2])
        scores = torch.einsum("tkgd,skd->tkgs", queries, keys) * scale
        if cap:
            scores = cap * torch.tanh(scores / cap)
        behind = turn[:, None] + len(slots) - torch.arange(len(keys), device=q.device)
        hidden = behind < 0 if window is None else (behind < 0) | (behind > window)
        scores.masked_fill_(hidden[:, None, None], -torch.inf)
        if sinks is not None:
            sunk = sinks.float().view(1, kv_heads, -1, 1).expand(len(turn), -1, -1, -1)
            scores = torch.cat((scores, sunk), -1)
        weights = scores.softmax(-1)[..., : len(keys)]
        out[rows] = torch.einsum("tkgs,skd->tkgd", weights, values).flatten(1, 2).to(out.dtype)


def sums_bytes(requests: int, most: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> int:
    """Return the bytes of `verify_attention`'s partial sums in a GPU forward, for requests of up to ``most`` rows."""
    from whiflash_kernels.triton_kernels import verify

    return verify.sums_bytes(requests, most, heads, kv_heads, dim, device)
