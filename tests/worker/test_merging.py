"""Drafts of a batch side by side, one behind the other, and as many as there are rows for."""

from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_sglang.drafters.base import Drafts
from whiflash_sglang.drafters.merging import behind, bucket_of, likeliest

chances = st.lists(st.sampled_from([0.2, 0.5, 0.9, 1.0]), max_size=4)


@settings(deadline=None, max_examples=200)
@given(st.lists(chances, min_size=1, max_size=5), st.integers(0, 20))
def test_the_likeliest_drafts_are_verified(requests: list[list[float]], room: int) -> None:
    alive = torch.zeros(len(requests), 4)
    for i, own in enumerate(requests):
        if own:
            alive[i, : len(own)] = torch.tensor(own).cumprod(0)
        alive[i, len(own) :] = 2.0  # padding, which must not be taken for drafts
    counts = torch.tensor([len(own) for own in requests])
    kept = likeliest(Drafts(torch.zeros(len(requests), 4, dtype=torch.int64), counts, alive), room)
    assert bool((kept <= counts).all())
    assert int(kept.sum()) == min(room, int(counts.sum())), "rows are left unused, or there are too few"
    taken = [alive[i, :k].tolist() for i, k in enumerate(kept.tolist())]
    left = [
        alive[i, k:n].tolist() for i, (k, n) in enumerate(zip(kept.tolist(), counts.tolist(), strict=True))
    ]
    assert min(chain(*taken), default=2.0) >= max(chain(*left), default=0.0)


def test_a_tail_goes_behind_the_drafts_that_count() -> None:
    drafts = Drafts(
        torch.tensor([[1, 2, 9, 9], [3, 9, 9, 9]]),
        torch.tensor([2, 1]),
        torch.tensor([[0.9, 0.8, 0.1, 0.1]] * 2),
    )
    more = Drafts(
        torch.tensor([[4, 0], [5, 6]]), torch.tensor([1, 2]), torch.tensor([[0.7, 0.0], [0.6, 0.5]])
    )
    joined = behind(drafts, more)
    assert joined.counts.tolist() == [3, 3]
    assert [row[:3] for row in joined.tokens.tolist()] == [[1, 2, 4], [3, 5, 6]]
    assert joined.alive is not None
    assert torch.allclose(joined.alive[:, :3], torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.6, 0.5]]))


def test_buckets_hold_what_they_are_for_and_are_few() -> None:
    sizes = [bucket_of(rows) for rows in range(1, 200)]
    assert all(rows <= size <= rows * 1.5 for rows, size in enumerate(sizes, start=1))
    assert sorted(set(sizes))[:8] == [1, 2, 3, 4, 6, 8, 12, 16]
