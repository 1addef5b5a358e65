"""Trees of drafts against their definitions: links, acceptance, and the distribution of what comes out."""

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan

from whiflash_sglang.platform import spec_ops


def random_parents(rng: random.Random, width: int) -> list[int]:
    """Parent of every node but the root; parents come first."""
    return [rng.randrange(node) for node in range(1, width)]


def mask_of(parents: list[int]) -> torch.Tensor:
    """[W, W] bool: a node sees itself and its ancestors."""
    seen = torch.eye(len(parents) + 1, dtype=torch.bool)
    for node, parent in enumerate(parents, 1):
        seen[node] |= seen[parent]
    return seen


def children(parents: list[int], node: int) -> list[int]:
    return [child for child, parent in enumerate(parents, 1) if parent == node]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 10_000))
def test_links_and_positions(bs: int, width: int, seed: int) -> None:
    rng = random.Random(seed)
    forest = [random_parents(rng, width) for _ in range(bs)]
    lengths = torch.tensor([rng.randrange(1, 50) for _ in range(bs)])
    links = [torch.empty((bs, width), dtype=torch.int64) for _ in range(3)]
    positions = torch.empty(bs * width, dtype=torch.int64)
    masks = torch.stack([mask_of(parents) for parents in forest])
    spec_ops.reconstruct_indices_from_tree_mask_func(masks.flatten(), lengths, positions, *links, bs, width)
    assert links[0].flatten().tolist() == list(range(bs * width))
    for b, tree in enumerate(spec_ops.links_of(links[1], links[2])):
        for node in range(width):
            assert list(tree.children(node)) == children(forest[b], node)
            depth = int(masks[b, node].sum()) - 1
            assert positions[b * width + node] == lengths[b] + depth


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 10_000))
def test_greedy_acceptance(bs: int, width: int, seed: int) -> None:
    """The longest path from the root along which every node holds the target's choice after its parent."""
    rng = random.Random(seed)
    forest = [random_parents(rng, width) for _ in range(bs)]
    candidates = torch.tensor([[rng.randrange(3) for _ in range(width)] for _ in range(bs)])
    target = torch.tensor([[rng.randrange(3) for _ in range(width)] for _ in range(bs)])
    tree = links(forest)
    predicts = torch.full((bs * width,), -7, dtype=torch.int32)
    index, count = torch.zeros((bs, width), dtype=torch.int32), torch.zeros(bs, dtype=torch.int32)
    spec_ops.verify_tree_greedy_func(predicts, index, count, candidates, *tree, target, topk=-1)
    for b, parents in enumerate(forest):
        path = [0]
        while True:
            wanted = target[b, path[-1]]
            match = [c for c in children(parents, path[-1]) if candidates[b, c] == wanted]
            if not match:
                break
            path.append(match[0])
        assert count[b] == len(path) - 1
        assert index[b, : len(path)].tolist() == [b * width + node for node in path]
        assert (index[b, len(path) :] == -1).all()
        assert predicts[index[b, : len(path)].long()].tolist() == target[b, path].tolist()


def links(forest: list[list[int]]) -> list[torch.Tensor]:
    bs, width = len(forest), len(forest[0]) + 1
    found = [torch.empty((bs, width), dtype=torch.int64) for _ in range(3)]
    masks = torch.stack([mask_of(parents) for parents in forest])
    positions = torch.empty(bs * width, dtype=torch.int64)
    spec_ops.reconstruct_indices_from_tree_mask_func(
        masks.flatten(), torch.ones(bs), positions, *found, bs, width
    )
    return found


def test_sampling_has_the_targets_distribution() -> None:
    """First two tokens over 12,000 draws of one tree with branches, against the exact joint distribution."""
    generator = torch.Generator().manual_seed(11)
    draws, vocabulary = 12_000, 4
    parents, tokens = [0, 0, 1, 1, 2], torch.tensor([9, 0, 2, 1, 3, 1])  # the root's token is committed
    probabilities = torch.rand((6, vocabulary), generator=generator) + 0.05
    probabilities /= probabilities.sum(-1, keepdim=True)
    coins = torch.rand((draws, 6), generator=generator)
    lasts = torch.rand(draws, generator=generator)
    tree = spec_ops.links_of(*links([parents])[1:])[0]
    counts = torch.zeros(vocabulary, vocabulary)
    after = {0: 1, 2: 2}  # token → the root's child that holds it
    follow = torch.rand(draws, generator=generator)
    for coin, last, more in zip(coins, lasts, follow, strict=True):
        path = spec_ops.accept_by_chance(tokens, tree, probabilities, coin, last, depth=6)
        # If the first token was not drafted, the next round samples the second.
        first, *others = path.tokens
        later = others or [spec_ops.draw(probabilities[after.get(first, 5)], more)]
        counts[first, later[0]] += 1
    exact = torch.stack([probabilities[0, t] * probabilities[after.get(t, 5)] for t in range(vocabulary)])
    assert chisquare(counts.flatten().numpy(), (exact * draws).double().flatten().numpy() * 1.0).pvalue > 1e-3


def test_slots_of_accepted_nodes() -> None:
    window = torch.arange(100, 110)
    front, taken = torch.zeros(10, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)
    spec_ops.fill_front_out_cache_loc_func(torch.tensor([2, 3]), window, front)
    assert front.tolist() == [100, 101, 105, 106, 107, 0, 0, 0, 0, 0]
    index = torch.tensor([[0, 3, -1, -1, -1], [5, 6, 9, -1, -1]], dtype=torch.int32)
    spec_ops.fill_accept_out_cache_loc_func(index, window, taken, 10)
    assert taken.tolist() == [100, 103, 105, 106, 109, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("prefixes", [(7,), (3, 20)])
def test_attention_of_a_tree_equals_that_of_each_branch(prefixes: tuple[int, ...]) -> None:
    """Every row's output is that of plain causal attention over its prefix and its own ancestors."""
    generator, rng = torch.Generator().manual_seed(2), random.Random(2)
    width, heads, size = 6, 2, 8
    forest = [random_parents(rng, width) for _ in prefixes]
    total = max(prefixes) + width
    table = torch.arange(len(prefixes) * total).view(len(prefixes), total)
    k, v = torch.randn((2, table.numel(), heads, size), generator=generator)
    q = torch.randn((len(prefixes) * width, heads, size), generator=generator)
    trees = [mask_of(parents) for parents in forest]
    lengths = [n + width for n in prefixes]
    widths = [width] * len(prefixes)
    plan = PagedAttentionPlan.build(table, widths, lengths, causal=True, dtype=q.dtype, trees=trees)
    out = plan.run(q, k, v, 0.3).view(len(prefixes), width, heads, size)
    for b, node in product(range(len(prefixes)), range(width)):
        own = [prefixes[b] + int(i) for i in trees[b][node].nonzero()]
        slots = table[b, [*range(prefixes[b]), *own]]
        weights = torch.einsum("hd,khd->hk", q[b * width + node], k[slots]).mul(0.3).softmax(-1)
        torch.testing.assert_close(out[b, node], torch.einsum("hk,khd->hd", weights, v[slots]))
