"""What captured passes read is loaded whole, in as few launches as there are kinds of it."""

import torch
from host_reads import Launches

from whiflash_sglang.drafters.paged import PADDING, PassInput
from whiflash_sglang.round.graphs import load


def test_a_group_is_loaded_with_its_padding_by_kind() -> None:
    given = PassInput.of_padding(4, torch.zeros(3), torch.zeros(8, 16, dtype=torch.int32))
    inputs = given.static
    for count in (4, 1, 3, 4):  # groups shrink and grow again
        rows, starts, bonus = (torch.arange(1, count + 1) * n for n in (1, 10, 100))
        tail = torch.arange(3.0 * count).view(count, 3) + count
        with Launches() as launches:
            load(inputs, (rows, starts, bonus, tail))
        assert launches.count == 2, "all numbers at once, and the features"
        assert given.rows.tolist() == [*rows.tolist(), *[0] * (4 - count)]
        assert given.starts.tolist() == [*starts.tolist(), *[PADDING] * (4 - count)]
        assert given.bonus[:count].tolist() == bonus.tolist()
        assert torch.equal(given.tail[:count], tail)


def test_an_arm_that_reads_no_feature_loads_its_numbers_alone() -> None:
    given = PassInput.of_padding(2, torch.zeros(0), torch.zeros(8, 16, dtype=torch.int32))
    inputs, ones, nothing = given.static, torch.ones(1, dtype=torch.int64), torch.zeros(1, 0)
    with Launches() as launches:
        load(inputs, (ones, ones, ones, nothing))
    assert launches.count == 1
