"""The torch versions of SGLang's speculation helpers, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from whiflash_cpu import spec_ops

TABLE = torch.randperm(400, generator=torch.Generator().manual_seed(0)).view(8, 50).to(torch.int32)


def test_slots_of_ragged_windows() -> None:
    rows, start, end = torch.tensor([3, 0, 5]), torch.tensor([4, 0, 10]), torch.tensor([7, 0, 15])
    found = spec_ops.extend_cache_locs(rows, TABLE, start, end, 3, 5, "cpu")
    assert found.dtype == torch.int64
    assert found[:8].tolist() == [*TABLE[3, 4:7].tolist(), *TABLE[5, 10:15].tolist()]
    assert found[8:].tolist() == [0] * 7


def test_slots_round_trip_through_the_table() -> None:
    rows, start, end = torch.tensor([1, 6]), torch.tensor([2, 20]), torch.tensor([5, 21])
    table, slots = torch.zeros(8, 50, dtype=torch.int32), torch.tensor([90, 91, 92, 93])
    spec_ops.assign_req_to_token_pool_func(rows, table, start, end, slots, 2)
    assert table[1, 2:5].tolist() == [90, 91, 92]
    assert table[6, 20].item() == 93
    assert int((table != 0).sum()) == 4
    assert spec_ops.extend_cache_locs(rows, table, start, end, 2, 2, "cpu").tolist() == slots.tolist()


def test_draft_slots_and_positions() -> None:
    rows, lengths = torch.tensor([2, 7]), torch.tensor([10, 30])
    out, positions = torch.empty(8, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    spec_ops.assign_draft_cache_locs_contiguous_func(rows, TABLE, lengths, out, 1, 4, positions)
    assert out.tolist() == [*TABLE[2, 10:14].tolist(), *TABLE[7, 30:34].tolist()]
    assert positions.tolist() == [10, 30]


def test_bonus_tokens_are_the_last_accepted() -> None:
    tokens, bonus = torch.arange(10), torch.empty(2, dtype=torch.int32)
    spec_ops.fill_bonus_tokens_func(tokens, torch.tensor([1, 4]), bonus, 5, 2)
    assert bonus.tolist() == [0, 8]


def test_a_chain_as_a_tree() -> None:
    lengths = torch.tensor([5, 9])
    links = [torch.full((2, 3), -1, dtype=torch.int64) for _ in range(3)]
    mask, positions = torch.zeros(18, dtype=torch.bool), torch.empty(6, dtype=torch.int64)
    empty = torch.empty(2, 0)
    spec_ops.build_tree_kernel_efficient_func(empty, empty, lengths, mask, positions, *links, 1, 2, 3, 1)
    assert positions.tolist() == [5, 6, 7, 9, 10, 11]
    assert links[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert links[1].tolist() == [[1, 2, -1], [1, 2, -1]]
    assert links[2].tolist() == [[-1] * 3] * 2
    assert torch.equal(mask.view(2, 3, 3)[1], torch.ones(3, 3).tril().bool())
    with pytest.raises(NotImplementedError, match="speculative-eagle-topk 1"):
        spec_ops.build_tree_kernel_efficient_func(empty, empty, lengths, mask, positions, *links, 2, 2, 3, 1)


def outputs(bs: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kinds = {"dtype": torch.int32}
    return torch.zeros(bs * width, **kinds), torch.full((bs, width), -1, **kinds), torch.empty(bs, **kinds)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 999))
def test_greedy_verification(bs: int, width: int, seed: int) -> None:
    """Accepted: the longest prefix of drafts that the target would have chosen; then the target's own token."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randint(2, (bs, width), generator=generator)
    target = torch.randint(2, (bs, width), generator=generator)
    predicts, index, number = outputs(bs, width)
    links = torch.empty(bs, width)
    spec_ops.verify_tree_greedy_func(predicts, index, number, candidates, links, links, links, target, topk=1)
    for b in range(bs):
        accepted = 0
        while accepted < width - 1 and candidates[b, accepted + 1] == target[b, accepted]:
            accepted += 1
        nodes = [b * width + j for j in range(accepted + 1)]
        assert number[b] == accepted
        assert index[b].tolist() == nodes + [-1] * (width - 1 - accepted)
        assert predicts[nodes].tolist() == target[b, : accepted + 1].tolist()


def test_sampled_verification_has_the_targets_distribution() -> None:
    """The joint distribution of two tokens, from 40,000 rounds that draft a fixed chain."""
    rounds, vocab = 40_000, 4
    generator = torch.Generator().manual_seed(1)
    # Conditional on the drafted first token being accepted, the second token follows its own row.
    rows = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.3, 0.2, 0.4, 0.1], [0.0, 0.7, 0.0, 0.3]], dtype=torch.float64)
    draft = torch.tensor([0, 1, 2])  # the bonus token of the round before, then two drafts
    predicts, index, number = outputs(rounds, 3)
    coins = torch.rand(rounds, 3, generator=generator)
    final = torch.rand(rounds, generator=generator)
    links = torch.tensor([1, 2, -1]).expand(rounds, 3)
    none = torch.full((rounds, 3), -1)
    spec_ops.tree_speculative_sampling_target_only(
        predicts,
        index,
        number,
        draft.expand(rounds, 3),
        none,
        links,
        none,
        coins,
        final,
        rows.float().expand(rounds, 3, vocab),
        torch.zeros(rounds, 3, vocab),
    )
    tokens = predicts.view(rounds, 3)
    counts = torch.bincount(tokens[:, 0], minlength=vocab)
    assert chisquare(counts, rows[0] * rounds).pvalue > 1e-3
    second = tokens[number >= 1, 1]
    assert chisquare(torch.bincount(second, minlength=vocab), rows[1] * len(second)).pvalue > 1e-3
    third = tokens[number == 2, 2]
    assert set(third.tolist()) == {1, 3}, "a token without probability was drawn"
    assert chisquare(torch.bincount(third)[[1, 3]], rows[2, [1, 3]] * len(third)).pvalue > 1e-3


def test_renormalisation() -> None:
    probs = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.4, 0.3, 0.2, 0.1]])
    top_k = spec_ops.top_k_renorm_prob(probs, torch.tensor([2, 1 << 30]))
    torch.testing.assert_close(top_k, torch.tensor([[0.625, 0, 0.375, 0], [0.4, 0.3, 0.2, 0.1]]))
    top_p = spec_ops.top_p_renorm_prob(probs, torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(top_p, torch.tensor([[0.625, 0, 0.375, 0], [1.0, 0, 0, 0]]))


def test_norm_and_rope_of_a_fused_projection() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, heads, kv_heads, dim = 5, 4, 2, 8
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=generator)
    q_weight, k_weight = torch.rand(dim, generator=generator), torch.rand(dim, generator=generator)
    positions = torch.tensor([0, 3, 9, 1, 30])
    angle = torch.arange(32)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
    cache = torch.cat([angle.cos(), angle.sin()], -1)
    expected = qkv.clone().view(rows, -1, dim)
    for head in range(heads + kv_heads):
        x = expected[:, head]
        weight = q_weight if head < heads else k_weight
        x = torch.nn.functional.rms_norm(x, (dim,), weight, eps=1e-6)
        a, b = x.chunk(2, -1)
        cos, sin = angle[positions].cos(), angle[positions].sin()
        expected[:, head] = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    spec_ops.table_qk_norm_rope_(qkv, positions, q_weight, k_weight, cache, heads, kv_heads, dim, 1e-6)
    torch.testing.assert_close(qkv, expected.view(rows, -1))
