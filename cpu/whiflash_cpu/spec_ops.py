"""Torch versions of SGLang's Triton- and CUDA-only speculation helpers.

Each function has the parameters of the upstream function that it replaces (see
:mod:`whiflash_cpu.seams`) and its contract: tensors marked mutable are filled in place. A chain
(``topk == 1``) is the only tree that is built: node ``i`` of a request's ``W`` rows is the only child of ``i - 1``.
"""

from typing import Any

import torch


def extend_cache_locs(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> torch.Tensor:
    """Return the KV slots of positions ``[start, end)`` of every request, packed: [batch_size * draft_token_num] int64,
    which must be enough; entries beyond the packed slots are 0.

    req_pool_indices: [bs] int, rows of ``req_to_token`` [requests, positions] int32. start_offset, end_offset: [bs]
    int. device: unused; the result is on the table's device.
    """
    out = torch.zeros(batch_size * draft_token_num, dtype=torch.int64)
    at = 0
    offsets = (x.tolist() for x in (req_pool_indices, start_offset, end_offset))
    for row, start, end in zip(*offsets, strict=True):
        out[at : at + end - start] = req_to_token[row, start:end]
        at += end - start
    return out


def assign_draft_cache_locs_contiguous_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    topk: int,
    num_cols: int,
    positions: torch.Tensor | None = None,
    mrope: torch.Tensor | None = None,
) -> None:
    """Write the slots of the ``topk * num_cols`` positions after ``seq_lens`` into ``out_cache_loc`` (mutable)."""
    width = topk * num_cols
    columns = seq_lens.view(-1, 1) + torch.arange(width)
    out_cache_loc.view(-1, width).copy_(req_to_token[req_pool_indices.view(-1, 1), columns])
    if positions is not None:
        positions.view(-1, topk).copy_(seq_lens.view(-1, 1).expand(-1, topk))
    if mrope is not None:
        mrope.view(3, -1, topk).copy_(seq_lens.view(1, -1, 1).expand(3, -1, topk))


def assign_req_to_token_pool_func(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write packed slots into positions ``[start, end)`` of every request's row (``req_to_token`` mutable)."""
    at = 0
    offsets = (x.tolist() for x in (req_pool_indices, start_offset, end_offset))
    for row, start, end in zip(*offsets, strict=True):
        req_to_token[row, start:end] = out_cache_loc[at : at + end - start]
        at += end - start


def get_last_loc(
    req_to_token: torch.Tensor, req_pool_indices_tensor: torch.Tensor, prefix_lens_tensor: torch.Tensor
) -> torch.Tensor:
    """Return the KV slot of every request's last prefix position, where its page continues; -1 without a prefix."""
    last = req_to_token[req_pool_indices_tensor.long(), (prefix_lens_tensor - 1).clamp_min(0).long()]
    return torch.where(prefix_lens_tensor > 0, last.to(prefix_lens_tensor.dtype), -1)


def fill_bonus_tokens_func(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """Write every request's last accepted token into ``bonus_tokens`` [bs] (mutable)."""
    last = torch.arange(batch_size) * accept_stride + accept_lens.view(-1).to(torch.int64) - 1
    bonus_tokens.copy_(accept_tokens.reshape(-1)[last])


def gather_spec_extras(
    indices: torch.Tensor,
    topk_p_buf: torch.Tensor,
    topk_index_buf: torch.Tensor,
    output_tokens_buf: torch.Tensor,
    hidden_states_buf: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return rows ``indices`` of the four buffers that pass draft inputs from one round to the next."""
    hidden = None if hidden_states_buf is None else hidden_states_buf[indices]
    return topk_p_buf[indices], topk_index_buf[indices], output_tokens_buf[indices], hidden


def build_tree_kernel_efficient_func(
    parent_list: torch.Tensor,
    top_scores_index: torch.Tensor,
    seq_lens: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int,
) -> None:
    """Describe a chain as upstream's tree: positions, links and (QLEN_ONLY) mask, all mutable. Raises
    NotImplementedError for a tree that is not a chain, or a mask in another layout."""
    require_chain(topk)
    if int(tree_mask_mode) != 1:
        raise NotImplementedError("the CPU platform keeps tree masks in the QLEN_ONLY layout only")
    bs, width = seq_lens.numel(), num_verify_tokens
    column = torch.arange(width)
    positions.view(bs, width).copy_(seq_lens.view(-1, 1) + column)
    retrieve_index.copy_(torch.arange(bs * width).view(bs, width))
    retrieve_next_token.copy_(torch.where(column + 1 < width, column + 1, -1).expand(bs, width))
    retrieve_next_sibling.fill_(-1)
    causal = torch.ones(width, width, dtype=torch.bool).tril_()
    tree_mask[: bs * width * width].view(bs, width, width).copy_(causal.expand(bs, width, width))


def verify_tree_greedy_func(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept drafts while they equal the target's argmax.

    predicts: [bs * W] int32, mutable: the target's token at every accepted node. accept_index: [bs, depth] int32,
    mutable: accepted nodes, global; -1 beyond. accept_token_num: [bs] int32, mutable: accepted drafts, without the
    bonus token. candidates, target_predict: [bs, W] int64. topk: 1; NotImplementedError is raised for another tree.
    """
    depth = accept_index.shape[1]
    require_chain(topk)
    matches = candidates[:, 1:depth] == target_predict[:, : depth - 1]
    accepted = matches.to(torch.int64).cumprod(1).sum(1)
    _write_accepted(predicts, accept_index, accept_token_num, accepted, target_predict)
    return predicts, accept_index, accept_token_num


def tree_speculative_sampling_target_only(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    uniform_samples: torch.Tensor,
    uniform_samples_for_final_sampling: torch.Tensor,
    target_probs: torch.Tensor,
    draft_probs: torch.Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Verify a chain of deterministic drafts by speculative sampling.

    In a chain, draft ``j`` is accepted with the target's probability of it; at the first rejection the token is drawn
    from the target without the rejected draft, after the last draft from the target. With both thresholds at 1 the
    result has the target's distribution (Leviathan et al., arXiv 2211.17192, for a point-mass draft).

    predicts, accept_index, accept_token_num, candidates: see :func:`verify_tree_greedy_func`. uniform_samples:
    [bs, W] in [0, 1), one per draft; uniform_samples_for_final_sampling: [bs]. target_probs: [bs, W, V] float32.
    draft_probs: zero by contract, unused. threshold_single, threshold_acc: a draft is also accepted at a probability
    of the first, and the second divides the probability; 1 and 1 keep the distribution.
    """
    depth = accept_index.shape[1]
    probs = target_probs[:, : depth - 1].gather(2, candidates[:, 1:depth, None]).squeeze(2)
    take = uniform_samples[:, : depth - 1] < probs / threshold_acc
    if threshold_single < 1:
        take |= probs >= threshold_single
    accepted = take.to(torch.int64).cumprod(1).sum(1)
    row = torch.arange(len(accepted))
    final = target_probs[row, accepted].clone()
    rejected = (accepted < depth - 1).nonzero().view(-1)
    final[rejected, candidates[rejected, accepted[rejected] + 1]] = 0
    cumulative = final.cumsum(-1)
    drawn = torch.searchsorted(
        cumulative, uniform_samples_for_final_sampling.view(-1, 1) * cumulative[:, -1:], right=True
    ).view(-1)
    # Rounding can carry a draw past the last token that has any probability.
    last_possible = final.shape[-1] - 1 - (final > 0).flip(-1).int().argmax(-1)
    bonus = torch.minimum(drawn, last_possible)
    tokens = torch.cat([candidates[:, 1:depth], candidates[:, :1]], dim=1).to(torch.int64)
    tokens[row, accepted] = bonus
    _write_accepted(predicts, accept_index, accept_token_num, accepted, tokens)


def top_k_renorm_prob(probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Keep the ``top_k`` [n] largest entries of every row of ``probs`` [n, V] and renormalise."""
    ordered, ids = probs.sort(dim=-1, descending=True)
    rank = torch.arange(probs.shape[-1])
    ordered = ordered.masked_fill(rank >= top_k.view(-1, 1), 0.0)
    kept = torch.zeros_like(probs).scatter_(-1, ids, ordered)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm_prob(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of largest entries whose sum reaches ``top_p`` [n] of every row, renormalised."""
    ordered, ids = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before > top_p.view(-1, 1), 0.0)
    kept = torch.zeros_like(probs).scatter_(-1, ids, ordered)
    return kept / kept.sum(-1, keepdim=True)


def table_qk_norm_rope_(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    num_q_heads: int,
    num_k_heads: int,
    head_dim: int,
    eps: float,
) -> None:
    """Apply head-wise RMSNorm and neox RoPE to the q and k parts of ``qkv`` [n, (Hq + 2 Hkv) * D], in place."""
    rows = qkv.shape[0]
    heads = qkv[:, : (num_q_heads + num_k_heads) * head_dim].view(rows, num_q_heads + num_k_heads, head_dim)
    x = heads.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    weight = torch.cat([q_weight.float().expand(num_q_heads, head_dim), k_weight.float().expand(num_k_heads, head_dim)])
    x = x * weight
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))


_LOW = 0xFFFFFFFF


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """Hash seed (64 bit), position and column, 16 bytes little-endian, by MurmurHash3 (x86, 32 bit, seed 0).

    Returns [n, m] uint32. seed: [n] uint64. positions: [n] int. col_indices: [m] int. Upstream has a Triton kernel and
    an operator that no published wheel has.
    """
    seed = seed.view(torch.int64)
    hashed = torch.zeros_like(seed)
    for block in (seed & _LOW, (seed >> 32) & _LOW, positions.to(torch.int64)):
        hashed = _murmur_mix(hashed, block)
    hashed = _murmur_mix(hashed[:, None], col_indices.to(torch.int64)[None]) ^ 16
    # A product may wrap around in 64 bits; its low 32 are right.
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & _LOW
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & _LOW
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def _murmur_mix(hashed: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _rotate_left((block * 0xCC9E2D51) & _LOW, 15)
    return (_rotate_left(hashed ^ ((block * 0x1B873593) & _LOW), 13) * 5 + 0xE6546B64) & _LOW


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _LOW


def require_chain(topk: int) -> None:
    """Raise NotImplementedError unless a tree's fan-out says that it is a chain."""
    if topk != 1:
        raise NotImplementedError(
            "the CPU platform verifies chains of drafts only; start with --speculative-eagle-topk 1"
        )


def _write_accepted(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    accepted: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Fill the three outputs of a chain verification; ``accepted`` [bs] draft counts, ``tokens`` [bs, >= depth]."""
    bs, depth = accept_index.shape
    width = predicts.numel() // bs
    column = torch.arange(depth)
    taken = column <= accepted.view(-1, 1)
    nodes = (torch.arange(bs) * width).view(-1, 1) + column
    accept_index.copy_(torch.where(taken, nodes, -1))
    accept_token_num.copy_(accepted)
    rows = predicts.view(bs, width)[:, :depth]
    rows.copy_(torch.where(taken, tokens[:, :depth].to(predicts.dtype), rows))
