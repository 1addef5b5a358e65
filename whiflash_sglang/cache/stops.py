"""The tokens that end running requests, on the device: a block ends at the first of them."""

from collections.abc import Iterable, Sequence

import torch

FEW = 8
"""Tokens that may end a request for which there is room from the start."""

NO_TOKEN = -1


class StopTable:
    """The tokens that end the request of each row, `NO_TOKEN` where a request has fewer than there are columns.

    Plain decoding never comes to what lies behind such a token: neither the engine nor anything of ours may learn of
    it, so `accept_and_commit` cuts there.

    few: `[request rows, FEW]` int64, the first of each, always in the same place. data: `[request rows, FEW or more]`
    int64, all of them; the same tensor until a request has more.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.few = self.data = torch.full((rows, FEW), NO_TOKEN, dtype=torch.int64, device=device)
        self._exceeding: set[int] = set()

    @staticmethod
    def bytes_for(rows: int) -> int:
        """What such a table takes, until a request has more than `FEW` stops."""
        return rows * FEW * torch.int64.itemsize

    def begin(self, row: int, stops: Sequence[int]) -> None:
        """A request begins in `row` that each of `stops` ends; empty: none does."""
        missing = len(stops) - self.data.shape[1]
        if missing > 0:
            with torch.inference_mode(False):  # else it could not be written outside of it
                self.data = torch.nn.functional.pad(self.data, (0, missing), value=NO_TOKEN)
        own = [*stops, *[NO_TOKEN] * (self.data.shape[1] - len(stops))]
        self.data[row] = torch.tensor(own, device=self.data.device)
        if self.data is not self.few:
            self.few[row] = self.data[row, :FEW]
        if len(stops) > FEW:
            self._exceeding.add(row)
        else:
            self._exceeding.discard(row)

    def exceed_few(self, rows: Iterable[int]) -> bool:
        """Whether a request in one of `rows` has more stops than `few` holds."""
        return not self._exceeding.isdisjoint(rows)
