"""A block ends at the first token that ends its request."""

import random

import torch
from whiflash_kernels import Committed

from whiflash_sglang.cache.stops import FEW, StopTable


def test_a_block_is_cut_behind_its_first_stop() -> None:
    rng = random.Random(0)
    for _ in range(100):
        rows, width = 3, rng.randint(1, 6)
        table = StopTable(8, "cpu")
        stops = [rng.sample(range(12), rng.randint(0, FEW + 2)) for _ in range(rows)]
        for row, own in enumerate(stops):
            table.begin(7, range(100))  # another request's, which needs more room
            table.begin(row + 2, own)
        counts = [rng.randint(1, width) for _ in range(rows)]
        tokens = [[rng.randrange(12) for _ in range(count)] for count in counts]
        padded = torch.tensor([own + [0] * (width - len(own)) for own in tokens])
        n = torch.tensor([10, 20, 30])
        accept_lens = torch.tensor(counts, dtype=torch.int32)
        bonus = torch.tensor([own[-1] for own in tokens])
        cut = table.until_stops(
            Committed(accept_lens, padded, bonus, n + accept_lens), torch.tensor([2, 3, 4])
        )
        for i, (own, ends) in enumerate(zip(tokens, stops, strict=True)):
            kept = next((own[: at + 1] for at, token in enumerate(own) if token in ends), own)
            if width == 1:
                kept = own
            assert cut.tokens[i, : cut.accept_lens[i]].tolist() == kept
            assert (int(cut.bonus[i]), int(cut.seq_lens[i])) == (kept[-1], int(n[i]) + len(kept))


def test_a_row_forgets_the_stops_of_the_request_before() -> None:
    table = StopTable(2, "cpu")
    table.begin(1, [5])
    table.begin(1, [])
    one = torch.tensor([1], dtype=torch.int32)
    block = Committed(one + 1, torch.tensor([[5, 6]]), torch.tensor([6]), torch.tensor([9]))
    assert table.until_stops(block, torch.tensor([1])).accept_lens.tolist() == [2]
