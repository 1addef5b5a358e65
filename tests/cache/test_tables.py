"""Caches keep their values where these were put, and take the bytes that they say."""

import torch

from whiflash_sglang.cache.backlog import FeatureRings, FeatureRows
from whiflash_sglang.cache.tokens import DraftKV, SamplingRows, TokenTable
from whiflash_sglang.device.transfers import Upload

ROWS, CONTEXT, MARGIN = 3, 10, 4


def test_written_keys_and_values_lie_at_their_slots() -> None:
    kv = DraftKV(2, 5, 3, 4, torch.float32, "cpu")
    slots, k, v = torch.tensor([4, 1]), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kv.write(1, slots, k, v)
    for kept, given in ((kv.k, k), (kv.v, v)):
        expected = torch.zeros(2, 5, 3, 4)
        expected[1, 4], expected[1, 1] = given
        assert torch.equal(kept, expected)
    assert kv.k.nbytes + kv.v.nbytes == 5 * DraftKV.bytes_per_token(2, 3, 4, torch.float32)


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
    assert table.data.nbytes == TokenTable.bytes_for(ROWS, CONTEXT, MARGIN)


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
