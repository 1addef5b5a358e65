"""Caches keep their values where these were put, and take the bytes that they say."""

from math import inf

import pytest
import torch

from whiflash_sglang.cache.backlog import FeatureRings, FeatureRows
from whiflash_sglang.cache.penalties import Penalties, PenaltyRows
from whiflash_sglang.cache.tokens import DraftKV, SamplingRows, TokenTable
from whiflash_sglang.device.transfers import Upload

ROWS, CONTEXT, MARGIN = 3, 10, 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_written_keys_and_values_lie_at_their_slots(dtype: torch.dtype) -> None:
    kv = DraftKV(2, 5, 3, 4, dtype, "cpu")
    slots, k, v = torch.tensor([4, 1]), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kv.write(1, slots, k, v)
    for kept, given in ((kv.k, k), (kv.v, v)):
        expected = torch.zeros(2, 5, 3, 4)
        expected[1, 4], expected[1, 1] = given
        assert torch.equal(kept.float(), expected.to(dtype).float())
    assert kv.k.nbytes + kv.v.nbytes == 5 * DraftKV.bytes_per_token(2, 3, 4, dtype)


def test_rings_take_what_is_reserved_for_them() -> None:
    rings = FeatureRings(ROWS, 8, 6, torch.bfloat16, "cpu").rings
    held = sum(t.nbytes for t in vars(rings).values() if isinstance(t, torch.Tensor))
    assert held == FeatureRings.bytes_for(ROWS, 8, 6, torch.bfloat16)


def test_rows_are_as_many_as_their_positions() -> None:
    one = torch.arange(7)
    assert len(FeatureRows(torch.zeros(7, 2), one, one, one)) == 7


def test_a_block_may_begin_at_the_contexts_end() -> None:
    table = TokenTable(ROWS, CONTEXT, MARGIN, "cpu")
    upload = Upload()
    table.begin(upload, 1, [0] * (CONTEXT - 4), [0, 0, 5, 6])
    upload.send(torch.device("cpu"))
    table.put_block(torch.tensor([1, 2]), torch.tensor([CONTEXT, 3]), torch.arange(20, 28).view(2, MARGIN))
    assert table.data[1].tolist() == [0] * 8 + [5, 6, 20, 21, 22, 23]
    assert table.data[2].tolist() == [0] * 3 + [24, 25, 26, 27] + [0] * 7
    assert not table.data[0].any()


def test_every_request_has_a_seed_of_its_own() -> None:
    """Also the second one in a row."""
    table, seeds = SamplingRows(ROWS, 5, "cpu"), {0}
    for row in (1, 1, 2):
        upload = Upload()
        table.begin(upload, row, (0.5, 40.0, 0.75, 0.25))
        upload.send(torch.device("cpu"))
        seeds.add(int(table.data.seeds[row]))
        assert table.data.parameters[row].tolist() == [0.5, 40.0, 0.75, 0.25]
    assert len(seeds) == 4


def test_penalties_have_places_while_their_requests_run() -> None:
    """Graphs read the first two, which stay where they are; more are made when they are needed."""
    rows = PenaltyRows(4, 9, 2, "cpu")
    where = [t.data_ptr() for t in rows.few]

    def begin(row: int, penalties: Penalties | None) -> list[int]:
        upload = Upload()
        rows.begin(upload, row, penalties)
        upload.send(torch.device("cpu"))
        return rows.few.places[row].tolist()

    biased = Penalties(0.5, 0.25, 1.5, {3: 2.0, 5: -1.0}, 7, 7, (8,))
    assert begin(1, biased)[0] == 0
    assert rows.few.factors[1].tolist() == [0.5, 0.25, 1.5]
    assert (rows.any([1]), rows.any([0, 2]), rows.exceed_few([1])) == (True, False, False)
    place, early, *positions = begin(2, biased._replace(enough=10))
    assert (sorted([place, early]), positions, rows.exceed_few([1, 2])) == ([1, 2], [7, 10], True)
    expected = [0, 0, 0, 2, 0, -1, 0, 0, 0]
    assert rows.data.bias[place].tolist() == expected
    assert rows.data.bias[early].tolist() == [*expected[:-1], -inf]
    assert rows.few.bias.tolist() == [expected, expected]
    for row in (1, 2):
        rows.end(row)
    assert not rows.any([1, 2])
    assert begin(1, None)[0] == -1
    assert begin(3, biased._replace(bias={}))[0] == 0
    assert not rows.few.bias[0].any()
    assert not rows.data.bias[0].any()
    assert [t.data_ptr() for t in rows.few] == where
