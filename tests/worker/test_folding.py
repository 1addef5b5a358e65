"""Strands without a server: what candidates add, which of them fit, and what a verification folds to."""

import math
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.candidates import Candidate
from whiflash_sglang.core import Strand
from whiflash_sglang.round.strands import Accepted, chosen_strands, fold, moves, pack, strand_of

CHAIN = Candidate().followed_by([5, 6, 7], [0.8, 0.4, 0.2], "chain")


def candidate(tokens: list[int], alive: list[float]) -> Candidate:
    return Candidate().followed_by(tokens, alive, "free")


def strand(owner: int = 0, fork: int = 0, *tokens: int, chance: float = 0.5) -> Strand:
    return Strand(owner, fork, list(tokens), 0, chance, "free")


def test_a_candidate_adds_what_follows_the_common_prefix() -> None:
    found = strand_of(3, CHAIN, candidate([5, 9, 8], [0.9, 0.81, 0.729]), room=5, worth=0.01)
    assert found is not None
    assert (found.owner, found.fork, found.tokens, found.source) == (3, 1, [9, 8], "free")


def test_a_contested_token_is_less_likely_than_its_candidate_says() -> None:
    found = strand_of(0, CHAIN, candidate([4], [0.6]), room=5, worth=0.0)
    assert found is not None
    assert abs(found.chance - 0.6 * 0.2 / (1 - 0.6 * 0.8)) < 1e-9


def test_tokens_that_are_not_worth_a_row_are_left_out() -> None:
    other = candidate([4, 3, 2], [0.6, 0.3, 0.01])
    found = strand_of(0, CHAIN, other, room=5, worth=0.1)
    assert found is not None
    assert found.tokens == [4, 3]
    assert strand_of(0, CHAIN, other, room=5, worth=0.5) is None
    assert strand_of(0, CHAIN, other, room=0, worth=0.0) is None
    found = strand_of(0, CHAIN, other._replace(alive=[0.6, 0.01, 0.3]), room=5, worth=0.1)
    assert found is not None
    assert found.tokens == [4], "what follows a token that is left out is no path"


def test_of_a_candidate_only_what_could_be_drafts_is_verified() -> None:
    for bad in (candidate([4, 99, 2], [0.6, 0.5, 0.4]), candidate([4, 3, 2], [0.6, math.nan, 0.4])):
        assert bad.valid(99) == candidate([4], [0.6])
    assert candidate([4, -1], [0.6, 0.5]).valid(99).tokens == [4]
    assert CHAIN.valid(8) == CHAIN


def test_a_candidate_that_says_the_same_adds_nothing() -> None:
    assert strand_of(0, CHAIN, candidate([5, 6], [0.9, 0.8]), room=5, worth=0.0) is None
    assert strand_of(0, CHAIN, candidate([5, 6, 7, 8], [0.9] * 4), room=5, worth=0.0) is None


def test_the_likeliest_strands_fit() -> None:
    found = [
        strand(0, 0, 1, 2, chance=0.2),
        strand(0, 0, 1, 3, chance=0.3),  # begins like the one before it
        strand(0, 1, 4, 4, 4, chance=0.4),
        strand(1, 0, 1, chance=0.9),
    ]
    taken = chosen_strands(found, widths=[3, 4], rooms=[7, 4], most=2, spare=5)
    assert [(one.owner, one.tokens, one.first_row) for one in taken] == [(0, [4, 4, 4], 3), (0, [1], 6)]
    assert [one.tokens for one in chosen_strands(found, [3, 4], [9, 8], most=2, spare=1)] == [[1]]
    alike = chosen_strands(found, [3, 4], [20, 8], most=3, spare=5)
    assert [one.tokens for one in alike] == [[4, 4, 4], [1, 3], [1]], "one of two that begin alike"


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@settings(deadline=None)
@given(
    chains=st.lists(TOKENS, min_size=1, max_size=3),
    voices=st.lists(st.tuples(st.integers(0, 2), TOKENS), max_size=6),
    truth=st.lists(st.integers(0, 2), min_size=40, max_size=40),
    rejected=st.sets(st.integers(0, 12), max_size=9),
)
def test_folding_finds_the_longest_path(
    chains: list[list[int]], voices: list[tuple[int, list[int]]], truth: list[int], rejected: set[int]
) -> None:
    """The target says the next token of `truth` on every path that agrees with it, and no token elsewhere. Drafts in
    `rejected` rows are wrong whatever it says.
    """
    size, lengths = len(chains), [10 * i + 3 for i in range(len(chains))]
    found = []
    for owner, tokens in voices:
        chain = candidate(chains[owner % size], [0.5] * len(chains[owner % size]))
        one = strand_of(owner % size, chain, candidate(tokens, [0.5] * len(tokens)), room=9, worth=0.0)
        found += [one] if one is not None else []
    widths = [1 + len(chain) for chain in chains]
    taken = chosen_strands(found, widths, [30] * size, most=3, spare=9)
    table = torch.arange(20 * 60, dtype=torch.int32).view(20, 60)
    tokens = torch.zeros((size, 4), dtype=torch.int64)
    for row, chain_ids in zip(tokens, chains, strict=True):
        row[: len(chain_ids)] = torch.tensor(chain_ids)
    every = torch.arange(size)
    counts = torch.tensor(widths, dtype=torch.int32)
    packed, belongs = (every + 50, tokens, counts, torch.tensor(lengths), every), every
    if taken:
        packed, belongs = pack(packed, lengths, taken, range(10, 19), table)
    starts, owners = packed[3].tolist(), belongs.tolist()
    check_rows(packed[4].tolist(), starts, taken, lengths, table)
    block = prepare_mixed_block(*packed, table)
    paths = [list(chain_ids) for chain_ids in chains] + [
        [*chains[one.owner][: one.fork], *one.tokens] for one in taken
    ]
    ends = block.qo_indptr.tolist()
    said = torch.full_like(block.input_ids, 99)
    for path, (begin, end), n in zip(paths, pairwise(ends), starts, strict=True):
        owner = owners[ends.index(begin)]
        skipped = n - lengths[owner]  # rows of the path that lie in the first chain
        for row in range(begin, end):
            known = skipped + row - begin
            if path[:known] == truth[:known]:
                said[row] = truth[known]
    for index in rejected - set(ends[:size]):
        if index < ends[-1]:
            block.input_ids[index] = -1
    for path, begin, n, owner in zip(paths, ends, starts, owners, strict=False):
        rows = [ends[owner] + 1 + i for i in range(len(path))]
        if (skipped := n - lengths[owner]) > 0:
            rows[skipped - 1 :] = range(begin, begin + len(path) - skipped + 1)
        path[:] = block.input_ids[rows].tolist()
    rows, bounds, accepted = fold(block, said, size, taken)
    indptr = bounds.tolist()
    kept = torch.arange(indptr[-1]) if rows is None else rows
    for owner in range(size):
        ids = block.input_ids[kept[indptr[owner] : indptr[owner + 1]]].tolist()[1:]
        best = max(agreement(path, truth) for path, i in zip(paths, owners, strict=True) if i == owner)
        assert agreement(ids, truth) == best
    for path, (one, right) in zip(paths[size:], accepted, strict=True):
        assert not right or one.fork + right <= agreement(path, truth)
    if any(right for _, right in accepted):
        check_moves(accepted, lengths, table)


def agreement(path: list[int], truth: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(path, truth, strict=False)) if a != b), len(path))


def check_rows(
    rows: list[int], starts: list[int], taken: list[Strand], lengths: list[int], table: torch.Tensor
) -> None:
    """A strand sees the slots of the path to its fork, then its own ones, which are its request's."""
    for index, one in enumerate(taken, len(lengths)):
        slots, n, begin = table[one.owner].tolist(), lengths[one.owner], starts[index]
        assert begin == n + 1 + one.fork
        own = slots[n + one.first_row :][: len(one.tokens)]
        assert table[rows[index], : begin + len(own)].tolist() == [*slots[:begin], *own]


def check_moves(accepted: Accepted, lengths: list[int], table: torch.Tensor) -> None:
    """Each accepted token's slot is its request's own, behind the fork; it comes from the strand's."""
    targets, sources = moves(accepted, range(len(lengths)), lengths, table)
    places = [(one, lengths[one.owner] + i) for one, right in accepted for i in range(right)]
    assert targets.tolist() == [int(table[one.owner, n + 1 + one.fork]) for one, n in places]
    assert sources.tolist() == [int(table[one.owner, n + one.first_row]) for one, n in places]
