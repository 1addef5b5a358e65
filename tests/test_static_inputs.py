"""What captured passes read is loaded whole, in one launch where it is words of 64 bits."""

import pytest
import torch
from host_reads import Launches

from whiflash_sglang.core import PADDING, DraftBatch
from whiflash_sglang.device.capture import load


@pytest.mark.parametrize(
    ("width", "dtype", "launched"),
    [(3, torch.float32, 2), (4, torch.float32, 1), (6, torch.bfloat16, 2), (8, torch.bfloat16, 1)],
)
def test_a_group_is_loaded_with_its_padding(width: int, dtype: torch.dtype, launched: int) -> None:
    given = DraftBatch.of_padding(4, torch.zeros(width, dtype=dtype), torch.zeros(8, 16, dtype=torch.int32))
    inputs = given.static
    for count in (4, 1, 3, 4):  # groups shrink and grow again
        rows, starts, bonus = (torch.arange(1, count + 1) * n for n in (1, 10, 100))
        tail = torch.arange(width * count, dtype=dtype).view(count, width) + count
        with Launches() as launches:
            load(inputs, (rows, starts, bonus, tail))
        assert launches.count == launched, "features go with the numbers where a row is words of their size"
        assert given.rows.tolist() == [*rows.tolist(), *[0] * (4 - count)]
        assert given.starts.tolist() == [*starts.tolist(), *[PADDING] * (4 - count)]
        assert given.bonus[:count].tolist() == bonus.tolist()
        assert torch.equal(given.tail[:count], tail)


def test_an_arm_that_reads_no_feature_loads_its_numbers_alone() -> None:
    given = DraftBatch.of_padding(2, torch.zeros(0), torch.zeros(8, 16, dtype=torch.int32))
    inputs, ones, nothing = given.static, torch.ones(1, dtype=torch.int64), torch.zeros(1, 0)
    with Launches() as launches:
        load(inputs, (ones, ones, ones, nothing))
    assert launches.count == 1


def test_a_source_of_another_kind_or_place_is_loaded_by_kind() -> None:
    given = DraftBatch.of_padding(2, torch.zeros(4), torch.zeros(8, 16, dtype=torch.int32))
    ones = torch.ones(2, dtype=torch.int64)
    shifted = torch.arange(9.0)[1:].view(2, 4)
    for tail in (shifted, shifted.to(torch.float64), torch.arange(8.0).view(4, 2).T):
        load(given.static, (ones, ones, ones, tail))
        assert torch.equal(given.tail, tail.float())
