"""Torch versions of SGLang's helpers for trees of drafts: what upstream's ``NGRAM`` verifies.

A request's ``W`` rows are the nodes of a tree whose root, node 0, is the last committed token. ``next_token`` of a node
is its first child and ``next_sibling`` the next child of its parent, -1 where there is none; a parent comes before its
children. Each function has the parameters of the upstream function that it stands in for, as in
:mod:`whiflash_sglang.platform.spec_ops`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Links(NamedTuple):
    """One request's tree, on the host."""

    next_token: list[int]
    next_sibling: list[int]

    def children(self, node: int) -> Iterator[int]:
        """Children of a node, in order."""
        child = self.next_token[node]
        while child >= 0:
            yield child
            child = self.next_sibling[child]


class Path(NamedTuple):
    """nodes: accepted ones, the root first. tokens: of each, the token that follows it in the output."""

    nodes: list[int]
    tokens: list[int]


def reconstruct_indices_from_tree_mask_func(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions and links of trees, from who sees whom.

    Args:
        tree_mask: [bs * W * W] bool; entry (b, i, j): node j is an ancestor of node i, or i itself.
        verified_seq_len: [bs] int, committed tokens: the root's position.
        positions: [bs * W] int64, mutable. retrieve_index, retrieve_next_token, retrieve_next_sibling: [bs, W]
            int64, mutable: packed row of each node, first child, next sibling.
    """
    bs, width = batch_size, draft_token_num
    node = torch.arange(width)
    above = tree_mask.view(bs, width, width).to(torch.bool) & (node < node[:, None])
    positions.view(bs, width).copy_(above.sum(-1) + verified_seq_len.view(-1, 1))
    retrieve_index.copy_(torch.arange(bs * width).view(bs, width))
    first = torch.where(above, node[:, None], width).amin(1)
    retrieve_next_token.copy_(torch.where(first < width, first, -1))
    parent = torch.where(above, node, -1).amax(-1)
    later = (parent[:, :, None] == parent[:, None, :]) & (node[:, None] > node)
    sibling = torch.where(later, node[:, None], width).amin(1)
    retrieve_next_sibling.copy_(torch.where((parent >= 0) & (sibling < width), sibling, -1))


def fill_front_out_cache_loc_func(
    num_front: torch.Tensor, out_cache_loc: torch.Tensor, front_out_cache_loc: torch.Tensor
) -> None:
    """The first ``num_front`` [bs] slots of every request's window, packed into the last argument (mutable)."""
    window = out_cache_loc.view(len(num_front), -1)
    packed = window[torch.arange(window.shape[1]) < num_front.view(-1, 1)]
    front_out_cache_loc[: len(packed)] = packed.to(front_out_cache_loc.dtype)


def fill_accept_out_cache_loc_func(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor, size: int
) -> None:
    """Slots of the accepted nodes, -1 among them left out, packed into ``accept_out_cache_loc`` (mutable)."""
    taken = accept_index.reshape(-1)[:size]
    packed = out_cache_loc[taken[taken >= 0].to(torch.int64)]
    accept_out_cache_loc[: len(packed)] = packed.to(accept_out_cache_loc.dtype)


def accept_greedily(candidates: torch.Tensor, links: Links, target: torch.Tensor, depth: int) -> Path:
    """Follow the target's choice from the root while one of a node's children is it.

    Args:
        candidates, target: [W] int64, each node's token and the target's choice after it. depth: most nodes.
    """
    tokens, wanted = candidates.tolist(), target.tolist()
    nodes = [0]
    while len(nodes) < depth:
        match = next((c for c in links.children(nodes[-1]) if tokens[c] == wanted[nodes[-1]]), None)
        if match is None:
            break
        nodes.append(match)
    return Path(nodes, [wanted[node] for node in nodes])


def accept_by_chance(
    candidates: torch.Tensor,
    links: Links,
    probabilities: torch.Tensor,
    coins: torch.Tensor,
    last_coin: torch.Tensor,
    depth: int,
    thresholds: tuple[float, float] = (1.0, 1.0),
) -> Path:
    """Follow a draw from the target at every node while a child holds it.

    A node's children share the interval [0, 1) by the target's probabilities of their tokens; the node's coin falls
    into one child or beyond all. Beyond all, the token is drawn from the target without the children's tokens, so
    that the output has the target's distribution, whatever was drafted.

    Args:
        candidates: [W] int64. probabilities: [W, V] float32. coins: [W] in [0, 1), one a node. last_coin: scalar.
        thresholds: single and accumulated; 1 and 1 keep the distribution.
    """
    single, accumulated = thresholds
    tokens = candidates.tolist()
    nodes = [0]
    followed: list[int] = []
    while True:
        node, at = nodes[-1], 0.0
        rest = probabilities[node]
        taken = None
        if len(nodes) < depth:
            rest = rest.clone()
            for child in links.children(node):
                chance = float(probabilities[node, tokens[child]])
                at += chance
                if float(coins[node]) < at / accumulated or chance >= single:
                    taken = child
                    break
                rest[tokens[child]] = 0.0
        if taken is None:
            return Path(nodes, [*followed, draw(rest, last_coin)])
        followed.append(tokens[taken])
        nodes.append(taken)


def draw(weights: torch.Tensor, coin: torch.Tensor) -> int:
    """The index whose share of the summed ``weights`` [V] the coin in [0, 1) falls into; it has some weight."""
    cumulative = weights.cumsum(-1)
    index = int(torch.searchsorted(cumulative, coin * cumulative[-1], right=True))
    # Rounding can carry a draw past the last index that has any weight.
    return min(index, int((weights > 0).nonzero()[-1]))


def write_paths(
    paths: list[Path], predicts: torch.Tensor, accept_index: torch.Tensor, accept_token_num: torch.Tensor
) -> None:
    """Fill upstream's three outputs.

    Args:
        predicts: [bs * W] int32, mutable. accept_index: [bs, depth] int32, mutable: packed rows; -1 beyond.
        accept_token_num: [bs] int32, mutable: accepted drafts, without the bonus token.
    """
    width = predicts.numel() // len(paths)
    accept_index.fill_(-1)
    for b, path in enumerate(paths):
        rows = torch.tensor(path.nodes) + b * width
        accept_index[b, : len(rows)] = rows.to(accept_index.dtype)
        predicts[rows] = torch.tensor(path.tokens, dtype=predicts.dtype)
        accept_token_num[b] = len(rows) - 1


def links_of(next_token: torch.Tensor, next_sibling: torch.Tensor) -> list[Links]:
    """Trees of a batch from their [bs, W] links."""
    return [
        Links(token, sibling)
        for token, sibling in zip(next_token.tolist(), next_sibling.tolist(), strict=True)
    ]
