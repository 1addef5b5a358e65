"""Attention as formulas: of one row, and of kernels by what their documentation says of the arguments they are handed.

FA3, FA4 and TRT-LLM take the rows of a request for those of its last positions, each of which sees the keys of its
window, the bounds included.
"""

from typing import Any

import torch


def of_row(query: Any, keys: Any, values: Any, scale: float, cap: float, sinks: Any) -> torch.Tensor:
    """One row's attention, [H, D], in 64 bits. keys, values: [N, Hkv, D]. sinks: [H] or None; cap: 0 for none."""
    keys, values = (x.double().repeat_interleave(query.shape[0] // keys.shape[1], 1) for x in (keys, values))
    scores = torch.einsum("hd,nhd->hn", query.double(), keys) * scale
    if cap:
        scores = cap * (scores / cap).tanh()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None]), 1)
    return torch.einsum("hn,nhd->hd", scores.softmax(-1)[:, : len(keys)], values)


def as_documented(
    query: Any, keys: Any, values: Any, *, table: Any, lengths: Any, offsets: Any, widest: int, **how: Any
) -> torch.Tensor:
    """Attention over pages. keys, values: [pages, page, Hkv, D]. window: positions before a row's own, -1 for all."""
    page, out = keys.shape[1], torch.full_like(query, torch.nan)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    for i, length in enumerate(lengths.tolist()):
        start, end = offsets[i : i + 2].tolist()
        assert end - start <= widest
        positions = torch.arange(length)
        slots = table[i].long()[positions // page] * page + positions % page
        for row in range(start, end):
            last = length - (end - row)
            first = 0 if how["window"] < 0 else max(last - how["window"], 0)
            seen = slots[first : last + 1]
            out[row] = of_row(query[row], keys[seen], values[seen], how["scale"], how["cap"], how["sinks"])
    return out


def flash(q: Any, k_cache: Any, v_cache: Any, **told: Any) -> torch.Tensor:
    """FA3's and FA4's `flash_attn_with_kvcache`."""
    assert told["causal"]
    before, behind = told["window_size"]
    assert behind == (-1 if before == -1 else 0)
    return as_documented(
        q,
        k_cache,
        v_cache,
        table=told["page_table"],
        lengths=told["cache_seqlens"],
        offsets=told["cu_seqlens_q"],
        widest=told["max_seqlen_q"],
        window=before,
        scale=told["softmax_scale"],
        cap=told["softcap"],
        sinks=told.get("sinks"),
    )


def trtllm_decode(query: Any, kv_cache: Any, **told: Any) -> torch.Tensor:
    """FlashInfer's `trtllm_batch_decode_with_kv_cache`, whose pages lie heads first."""
    assert told["q_len_per_req"] is None
    assert told["bmm2_scale"] == 1
    keys, values = (x.permute(0, 2, 1, 3) for x in kv_cache)
    return as_documented(
        query,
        keys,
        values,
        table=told["block_tables"],
        lengths=told["seq_lens"],
        offsets=told["cum_seq_lens_q"],
        widest=told["max_q_len"],
        window=told["window_left"],
        scale=told["bmm1_scale"],
        cap=0.0,
        sinks=told["sinks"],
    )
