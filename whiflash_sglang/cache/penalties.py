"""Penalties and biases of running requests, on the device: they change logits before tokens are sampled."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

import torch
from whiflash_kernels import PenaltyTable

from whiflash_sglang.device.transfers import Upload

MOST_PENALISED, MORE = 128, 16
"""Most biases that graphs read, since more would take memory from KV; number by which the table grows."""


class Penalties(NamedTuple):
    """Penalties and biases of a request.

    bias: by token. answer: position of its first generated token. From position `enough` on `stops` may end it.
    """

    frequency: float
    presence: float
    repetition: float
    bias: Mapping[int, float]
    answer: int
    enough: int
    stops: Sequence[int]


class PenaltyRows:
    """The `Penalties` of each row's request.

    few: `PenaltyTable` of all rows with room for `places` biases, always at the same address. data: the same, with room
    for as many biases as were needed; it is `few` until these are more than `places`.
    """

    def __init__(self, rows: int, vocabulary: int, places: int, device: torch.device | str) -> None:
        self.few = self.data = PenaltyTable(
            torch.ones((rows, 3), dtype=torch.float32, device=device),
            torch.full((rows, 4), -1, dtype=torch.int64, device=device),
            torch.zeros((places, vocabulary), dtype=torch.float32, device=device),
            torch.zeros((places, vocabulary), dtype=torch.int32, device=device),
        )
        self._free, self._taken = list(range(places)), dict[int, list[int]]()

    def begin(self, upload: Upload, row: int, penalties: Penalties | None) -> None:
        """Set the penalties of a request that begins in `row`, once `upload` is sent. None: no logits change."""
        known = row in self._taken
        self.end(row)
        if penalties is None:
            if known:
                del self._taken[row]
                upload.then(upload.ints([-1] * 4), self.few.places[row].copy_)
            return
        while len(self._free) < 2:
            self._grow()
        # A request that may not end yet takes a second place, with a bias that forbids its stops until then.
        taken = [self._free.pop(0) for _ in range(1 + (penalties.enough > penalties.answer))]
        self._taken[row], ids = taken, list[torch.Tensor]()

        def put(values: torch.Tensor) -> None:
            for bias in {id(table): table.bias for table in (self.few, self.data)}.values():
                for place in (place for place in taken if place < len(bias)):
                    bias[place].zero_().index_copy_(0, ids[0], values)
                    if place != taken[0]:
                        bias[place].index_fill_(0, ids[1], -inf)

        upload.then(upload.ints(list(penalties.bias)), ids.append)
        upload.then(upload.ints(penalties.stops), ids.append)
        upload.then(upload.floats(list(penalties.bias.values())), put)
        places = upload.ints([taken[0], taken[-1], penalties.answer, penalties.enough])
        upload.then(places, self.few.places[row].copy_)
        upload.then(upload.floats(penalties[:3]), self.few.factors[row].copy_)

    def end(self, row: int) -> None:
        """Free the places of the request in `row`, if it has any."""
        if row in self._taken:
            self._free, self._taken[row] = sorted([*self._free, *self._taken[row]]), []

    def any(self, rows: Iterable[int]) -> bool:
        """Whether a request in one of `rows` is penalised."""
        return any(self._taken.get(row) for row in rows)

    def exceed_few(self, rows: Iterable[int]) -> bool:
        """Whether a request in one of `rows` has its bias in a place beyond those of `few`."""
        few, grown = len(self.few.bias), self.data is not self.few
        return grown and any(place >= few for row in rows for place in self._taken.get(row, ()))

    def _grow(self) -> None:
        size = len(self.data.bias)
        with torch.inference_mode(False):  # an inference tensor could not be written elsewhere
            bias, counts = (torch.nn.functional.pad(t, (0, 0, 0, MORE)) for t in self.data[2:])
        self.data = self.data._replace(bias=bias, counts=counts)
        self._free += range(size, size + MORE)
