"""Watermarks and the bounded backlog of features (Lazy Catch-up, arXiv 2606.07710).

`Watermarks` is host-side book-keeping and imports nothing; `FeatureRings` holds the parked rows on the device.

Conventions: at the start of a round a request has n committed tokens *with* target KV and features, 0..n-1.
`synced[arm]` = s means the drafter's KV is valid on [0, s). Features of [min(s), n) and of n-1 are parked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from whiflash_kernels import BacklogRings, park, unpark


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open token interval [begin, end) of the request in row `row` of the request table."""

    row: int
    begin: int
    end: int


class Watermarks:
    """How far each drafter's KV is valid, per request row.

    Args:
        arms: names of the drafters that keep KV.
        capacity: tokens a ring holds per request.
    """

    def __init__(self, arms: Iterable[str], capacity: int) -> None:
        self.arms = tuple(arms)
        self.capacity = capacity
        self._synced: dict[int, dict[str, int]] = {}

    def reset(self, row: int, length: int) -> None:
        """The request in `row` now has `length` tokens, all of them valid for every drafter (after a prefill)."""
        self._synced[row] = dict.fromkeys(self.arms, length)

    def forget(self, row: int) -> None:
        """Drop the row (finish, abort, retraction). Unknown rows are ignored: a row may end before it began."""
        self._synced.pop(row, None)

    def synced(self, row: int, arm: str) -> int:
        """Length up to which `arm`'s KV is valid for the request in `row`."""
        return self._synced[row][arm]

    def known(self, row: int) -> bool:
        return row in self._synced

    def advance(self, row: int, arm: str, length: int) -> None:
        """`arm` has ingested up to `length`. Raises ValueError when that would move it back."""
        if length < self._synced[row][arm]:
            raise ValueError(
                f"watermark of {arm!r} cannot go back from {self._synced[row][arm]} to {length} (row {row})"
            )
        self._synced[row][arm] = length

    def due(
        self,
        arm: str,
        rows: Sequence[int],
        lengths: Sequence[int],
        chosen: Sequence[bool],
        widths: Sequence[int],
    ) -> list[Span]:
        """What `arm` has to ingest before this round.

        Requests that chose the arm catch up to n. Another request catches up only when its ring could
        overflow after this round's verification commits up to `width` more tokens: flushed, never dropped.
        Feature n-1 stays parked through any flush.
        """
        spans = []
        for row, n, is_chosen, width in zip(rows, lengths, chosen, widths, strict=True):
            begin = self._synced[row][arm]
            overflows = n + width - min(begin, n - 1) > self.capacity
            if begin < n and (is_chosen or overflows):
                spans.append(Span(row, begin, n))
        return spans

    def backlog(self, row: int, length: int) -> int:
        """Tokens parked for the drafter that lags most."""
        return length - min(self._synced[row].values(), default=length)


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Packed features of committed tokens on their way into a drafter's KV.

    features: [N, F] as captured. positions: [N] int64. slots: [N] int64 KV slots. next_tokens: [N] int64,
    the token at position + 1.
    """

    features: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    next_tokens: torch.Tensor

    def __len__(self) -> int:
        return int(self.positions.shape[0])


class FeatureRings:
    """Bounded per-request rings of captured features and of the tokens that follow them.

    Args:
        rows: request rows. capacity: tokens per request. width: columns of one captured row.
    """

    def __init__(
        self, rows: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.rings = BacklogRings.allocate(rows, capacity, width, dtype=dtype, device=device)

    @staticmethod
    def bytes_for(rows: int, capacity: int, width: int, dtype: torch.dtype) -> int:
        return rows * capacity * (width * dtype.itemsize + torch.int64.itemsize)

    def park(
        self,
        features: torch.Tensor,
        next_tokens: torch.Tensor,
        rows: torch.Tensor,
        begins: torch.Tensor,
        counts: torch.Tensor,
        row_starts: torch.Tensor,
        *,
        widest: int,
    ) -> None:
        """Keep `counts[b]` rows of `features` [T, F], from row `row_starts[b]`, at positions from `begins[b]`.

        `widest`: no count is larger.
        """
        park(self.rings, features, next_tokens, rows, begins, counts, row_starts, max_length=widest)

    def tail(self, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Feature n-1 of every request: [B, F]."""
        return self.rings.features[rows, (lengths - 1) % self.rings.capacity]

    def unpark(self, spans: Sequence[Span], slot_table: torch.Tensor) -> FeatureRows:
        """Gather parked spans into one packed batch; slots are resolved now, since the tree may remap them.

        Args:
            slot_table: [rows, ctx] int32, request row and position → KV slot.
        """
        bounds = torch.tensor([(s.row, s.begin, s.end) for s in spans], device=self.rings.features.device)
        rows, begins, ends = bounds.unbind(1)
        packed = unpark(self.rings, rows, begins, ends, slot_table, rows=sum(s.end - s.begin for s in spans))
        return FeatureRows(packed.features, packed.positions, packed.cache_slots, packed.next_tokens)
