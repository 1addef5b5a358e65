"""A block ends at the first token that ends its request."""

import random
from collections.abc import Sequence

import torch
from whiflash_kernels import Committed, accept_and_commit

from whiflash_sglang.cache.tokens import FEW, StopTable
from whiflash_sglang.device.transfers import Upload


def begin(table: StopTable, row: int, stops: Sequence[int]) -> None:
    upload = Upload()
    table.begin(upload, row, stops)
    upload.send(torch.device("cpu"))


def commit(table: StopTable, texts: list[list[int]], rows: list[int]) -> Committed:
    """Commit blocks whose drafts are all right: everything up to a stop."""
    ids = [token for own in texts for token in (99, *own[:-1])]
    ends = torch.tensor([0, *map(len, texts)]).cumsum(0).to(torch.int32)
    return accept_and_commit(
        torch.tensor([token for own in texts for token in own]),
        torch.tensor(ids),
        ends,
        torch.arange(10, 10 * len(texts) + 1, 10),
        stride=max(map(len, texts)),
        request_slots=torch.tensor(rows),
        stops=table.few,
        text=torch.zeros((8, 10 * len(texts) + 8), dtype=torch.int64),
    )


def test_a_block_is_cut_behind_its_first_stop() -> None:
    rng = random.Random(0)
    for _ in range(100):
        rows, width = 3, rng.randint(1, 6)
        table = StopTable(8, "cpu")
        stops = [rng.sample(range(12), rng.randint(0, FEW)) for _ in range(rows)]
        begin(table, 7, range(100))  # another request's, of which the scheduler cuts runs, too
        for row, own in enumerate(stops):
            begin(table, row + 2, own)
        texts = [[rng.randrange(12) for _ in range(rng.randint(1, width))] for _ in range(rows)]
        cut = commit(table, texts, [2, 3, 4])
        for i, (own, ends) in enumerate(zip(texts, stops, strict=True)):
            kept = next((own[: at + 1] for at, token in enumerate(own) if token in ends), own)
            assert cut.tokens[i, : cut.accept_lens[i]].tolist() == kept
            assert (int(cut.bonus[i]), int(cut.seq_lens[i])) == (kept[-1], 10 * (i + 1) + len(kept))


def test_a_row_forgets_the_stops_of_the_request_before() -> None:
    table = StopTable(2, "cpu")
    begin(table, 1, [5])
    assert commit(table, [[5, 6]], [1]).accept_lens.tolist() == [1]
    begin(table, 1, [])
    assert commit(table, [[5, 6]], [1]).accept_lens.tolist() == [2]
