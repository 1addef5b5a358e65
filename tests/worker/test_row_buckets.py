"""Sizes of verifications whose rows the host may not count."""

from whiflash_sglang.device.capture import bucket_of


def test_buckets_hold_what_they_are_for_and_are_few() -> None:
    sizes = [bucket_of(rows) for rows in range(1, 200)]
    assert all(rows <= size <= rows * 1.5 for rows, size in enumerate(sizes, start=1))
    assert sorted(set(sizes))[:8] == [1, 2, 3, 4, 6, 8, 12, 16]
