"""A choice from a head that several processes share is the one that a process with the whole head makes."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from whiflash_kernels import routing_stats

from whiflash_sglang.formats import choice
from whiflash_sglang.formats.choice import Choice, DraftHead, Shard, choose

VOCABULARY, SIZE = 23, 5


Gather = Callable[[torch.Tensor], torch.Tensor]
Heads = Callable[[Gather], Sequence[DraftHead]]
"""The heads of all processes, given how they talk."""


def together(heads: Heads, chosen: Callable[[DraftHead], Choice]) -> list[Choice]:
    """Choices of each process. They run one after the other: first to hear what each sends, then to choose."""
    sent: list[torch.Tensor] = []

    def hear(own: torch.Tensor) -> torch.Tensor:
        sent.append(own)
        return own[None]

    for head in heads(hear):
        chosen(head)
    everything = torch.stack(sent)
    return [chosen(head) for head in heads(lambda _: everything)]


def split(weight: torch.Tensor, cuts: Sequence[int], gather: Gather) -> list[DraftHead]:
    """`weight` [V, H], cut at rows."""
    return [
        DraftHead(weight[begin:end], None, shard=Shard(torch.arange(begin, end), gather))
        for begin, end in pairwise([0, *sorted(cuts), len(weight)])
    ]


def matrices(seed: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A head and states of few different values, so that logits are exact in any order and often equal."""
    make = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (VOCABULARY, SIZE), generator=make).float()
    return weight, torch.randint(-1, 2, (6, SIZE), generator=make).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_read_gives_the_same_choices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = (4 * torch.randn(40, 700, generator=torch.Generator().manual_seed(1))).to(dtype)
    shard = Shard(torch.arange(700), lambda own: own[None])
    wanted = [choose(logits, shard), choose(logits), DraftHead(torch.zeros(700, 1), None).total(logits)]
    reads = []
    monkeypatch.setattr(choice, "backend_for", lambda _: "triton")
    monkeypatch.setattr(choice, "routing_stats", lambda own: (reads.append(own), routing_stats(own))[1])
    found = [choose(logits, shard), choose(logits), DraftHead(torch.zeros(700, 1), None).total(logits)]
    assert len(reads) == 3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_drafter_without_numbers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lay_drafts` takes NaN for a fault. On a GPU a kernel computes the statistics; here its reference does."""
    monkeypatch.setattr(choice, "backend_for", lambda _: "triton")
    logits = torch.randn(3, 50)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    assert choose(logits).confidence.isnan().tolist() == [False, True, True]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(1, 8),
    cuts=st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=3),
)
def test_choices(seed: int, levels: int, cuts: list[int]) -> None:
    """Ties too, and processes without a row."""
    weight, hidden = matrices(seed, levels)
    whole = choose(hidden @ weight.T)

    def heads(gather: Gather) -> list[DraftHead]:
        return split(weight, cuts, gather)

    for found in together(heads, lambda head: head.choose(head.logits(hidden))):
        assert found.token.tolist() == whole.token.tolist()
        torch.testing.assert_close(found.confidence, whole.confidence)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, VOCABULARY), min_size=1, max_size=3),
    count=st.integers(1, VOCABULARY),
)
def test_candidates(seed: int, cuts: list[int], count: int) -> None:
    """The largest logits, under ids that have them; every process has the same, one without a row too."""
    make = torch.Generator().manual_seed(seed)
    weight, hidden = torch.randn(VOCABULARY, SIZE, generator=make), torch.randn(6, SIZE, generator=make)
    logits = hidden @ weight.T

    def candidates(head: DraftHead) -> Choice:
        return Choice(*head.candidates(head.logits(hidden), count))

    found = together(lambda gather: split(weight, cuts, gather), candidates)
    sums = together(
        lambda gather: split(weight, cuts, gather), lambda head: Choice(hidden, head.total(head.logits(hidden)))
    )
    for total in sums:
        torch.testing.assert_close(total.confidence, logits.logsumexp(-1))
    for ids, values in (*found, candidates(DraftHead(weight, None))):
        torch.testing.assert_close(values, logits.topk(count).values)
        torch.testing.assert_close(logits.gather(-1, ids), values)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000), cut=st.integers(0, VOCABULARY), ids=st.sets(st.integers(0, VOCABULARY - 1), min_size=1)
)
def test_a_part_of_the_vocabulary_beside_a_second_matrix(seed: int, cut: int, ids: set[int]) -> None:
    weight, hidden = matrices(seed, 2)
    second, latent = matrices(seed + 1, 2)
    vocabulary = torch.tensor(sorted(ids))

    def chosen(head: DraftHead) -> Choice:
        return head.choose(head.logits(hidden) + head.second(latent))

    def heads(gather: Gather) -> list[DraftHead]:
        parts = [head.beside(second).within(vocabulary) for head in split(weight, [cut], gather)]
        assert all(part.target_ids(torch.arange(len(ids))).tolist() == sorted(ids) for part in parts)
        return parts

    expected = chosen(DraftHead(weight, None).beside(second).within(vocabulary))
    for found in together(heads, chosen):
        assert found.token.tolist() == expected.token.tolist()
        torch.testing.assert_close(found.confidence, expected.confidence)


def test_a_block_without_its_first_row_copies_no_matrix() -> None:
    """Its rows do not lie together; torch would expand the head by the requests and copy it."""
    weight = torch.randn(300, SIZE)
    rows = torch.randn(4, 8, SIZE)[:, 1:]
    asked: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            asked.extend(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Products():
        found = DraftHead(weight, None).logits(rows)
    torch.testing.assert_close(found, rows @ weight.T)
    assert found.shape == (4, 7, 300)
    assert not [shape for shape in asked if len(shape) == 3 and shape[-1] * shape[-2] == weight.numel()]
