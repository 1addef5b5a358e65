"""Groups of requests that attend together."""

from hypothesis import given
from hypothesis import strategies as st
from whiflash_kernels.reference.grouping import GROUP, ROW, group

SIZES = st.lists(st.tuples(st.integers(1, 64), st.integers(64, 4096)), max_size=12)


def cost(groups: list[list[int]], q_lens: list[int], kv_lens: list[int]) -> float:
    """In entries read: every member pays for its group's widest and longest."""
    return sum(
        GROUP + len(g) * max(kv_lens[i] for i in g) * (1 + ROW * max(q_lens[i] for i in g)) for g in groups
    )


@given(SIZES)
def test_every_request_is_in_one_group_and_no_single_one_is_cheaper(sizes: list[tuple[int, int]]) -> None:
    q_lens, kv_lens = [m for m, _ in sizes], [n for _, n in sizes]
    members = list(range(len(sizes)))
    groups = group(members, q_lens, kv_lens)
    assert sorted(i for g in groups for i in g) == members
    if members:
        apart = [[i] for i in members]
        best = min(cost([members], q_lens, kv_lens), cost(apart, q_lens, kv_lens))
        assert cost(groups, q_lens, kv_lens) <= best * (1 + 1e-9)


def test_alike_requests_attend_together() -> None:
    assert group(range(8), [1] * 8, [600] * 8) == [list(range(8))]
    assert group(range(4), [2, 1, 2, 1], [90, 80, 70, 100]) == [[0, 1, 2, 3]]


def test_a_wide_or_long_one_attends_alone() -> None:
    assert group(range(4), [2, 25, 2, 2], [600] * 4) == [[0, 2, 3], [1]]
    assert group(range(4), [1] * 4, [100, 100, 1400, 100]) == [[0, 1, 3], [2]]
    assert group([1, 3], [0, 8, 0, 8], [600] * 4) == [[1, 3]]
