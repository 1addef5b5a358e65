"""Watermarks and the bounded backlog of features (Lazy Catch-up, arXiv 2606.07710).

Conventions: at the start of a round a request has n committed tokens *with* target KV and features, 0..n-1.
`synced[arm]` = s means the drafter's KV is valid on [0, s). Features of [min(s), n) and of n-1 are parked.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace

import torch
from whiflash_kernels import BacklogRings, PassInputs, draft_inputs, park, unpark
from whiflash_kernels.structs import PADDING

TOKENS = 64  # features that a request's ring holds for idle drafters before a flush
TOGETHER = 256
"""Tokens of a catch-up up to which half-full rings join it: a GPU computes with so many while it reads the weights."""


class FeatureSlice:
    """Selects a drafter's layers out of all captured ones.

    The target captures the layers of all drafters once, concatenated in layer order: [T, U * H].

    Args:
        captured: all captured layers, ascending. layers: the drafter's, in the order that its projection expects.
        hidden: the target's hidden size H.

    Raises:
        ValueError: a layer of the drafter's is not captured.
    """

    def __init__(self, captured: tuple[int, ...], layers: tuple[int, ...], hidden: int) -> None:
        missing = sorted(set(layers) - set(captured))
        if missing:
            raise ValueError(f"layers {missing} are not captured; the target captures {list(captured)}")
        index = tuple(captured.index(layer) for layer in layers)
        self.hidden, self._layers = hidden, len(captured)
        self.chunks = None if index == tuple(range(len(captured))) else index
        """Indices of its layers among the captured ones, as kernels take them; None: it reads all, in their order."""

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Select its columns: [T, U * H] → [T, len(layers) * H]; returns the input itself if it reads all."""
        if self.chunks is None:
            return features
        grid = features.view(-1, self._layers, self.hidden)
        return torch.cat([grid[:, i] for i in self.chunks], dim=-1)


class Watermarks:
    """Lengths up to which each drafter's KV is valid, per request row.

    `device` [arms, request rows] int64 has the true values: it moves with lengths that only the device may know. The
    host keeps lower bounds, which are exact as long as it knows every n, so that no ring overflows.

    Args:
        arms: names of the drafters that have KV. capacity: tokens a ring holds per request. rows: of the request table.
    """

    def __init__(self, arms: Iterable[str], capacity: int, rows: int, device: torch.device | str = "cpu") -> None:
        self.arms = tuple(arms)
        self.capacity = capacity
        self.device = torch.zeros((len(self.arms), rows), dtype=torch.int64, device=device)
        self._lower: dict[int, dict[str, int]] = {}

    def reset(self, row: int, length: int) -> None:
        """Set the host's watermarks of `row` to `length`, which a prefill has made valid for every drafter.

        `device` is set by `put`.
        """
        self._lower[row] = dict.fromkeys(self.arms, length)

    def forget(self, row: int) -> None:
        """Drop the row (finish, abort, retraction). Unknown rows are ignored: a row may end before it began."""
        self._lower.pop(row, None)

    def synced(self, row: int, arm: str) -> int:
        """Return the least length up to which `arm`'s KV is valid for the request in `row`, as the host knows it."""
        return self._lower[row][arm]

    @property
    def rows(self) -> Set[int]:
        """Return the rows of running requests."""
        return self._lower.keys()

    def put(self, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Set the device's watermarks of rows [B] int64 to lengths [B] int64, for every arm (after a prefill)."""
        if self.arms:
            self.device.index_copy_(1, rows, lengths.expand(len(self.arms), -1))

    def flushed(self, row: int, arm: str, length: int) -> None:
        """Raise the host's watermark of `arm` in `row` to `length`. Raises ValueError if it would move back."""
        if length < self._lower[row][arm]:
            raise ValueError(
                f"watermark of {arm!r} cannot go back from {self._lower[row][arm]} to {length} (row {row})"
            )
        self._lower[row][arm] = length

    def due(
        self,
        arm: str,
        rows: Sequence[int],
        least: Sequence[int],
        most: Sequence[int],
        chosen: Sequence[bool],
        widths: Sequence[int],
        verifying: int | None = None,
    ) -> tuple[list[int], int]:
        """Choose the requests that `arm` has to catch up before this round. Returns their indices, and how many tokens
        they ingest together: at most, or exactly if n is known. The host's watermarks advance here.

        Requests that chose the arm catch up to n. Another request catches up only if its ring could overflow when this
        round commits its share of `widths`: its features are ingested, never dropped. If a pass runs for such requests
        only, those with half a ring join it, which spares them a pass of their own. Feature n-1 stays parked through
        any flush. Requests that have ended are skipped. verifying: rows that earlier rounds still verify, which bounds
        the tokens that requests have committed without the host's knowledge.
        """
        lower = self._lower
        behind = [high - lower[row][arm] if row in lower else 0 for row, high in zip(rows, most, strict=True)]
        lagging = [index for index, tokens in enumerate(behind) if tokens > 0]
        full = {i for i in lagging if max(behind[i], 1) + widths[i] > self.capacity}
        members = [i for i in lagging if chosen[i] or i in full]
        total, known = sum(min(behind[i], self.capacity) for i in members), 0
        if members and not any(chosen[i] for i in members):
            for i in lagging:
                if i not in full and 2 * behind[i] >= self.capacity and total + behind[i] <= TOGETHER:
                    members.append(i)
                    total += behind[i]
        for index in members:
            begin, low = self._lower[rows[index]][arm], least[index]
            known += min(max(low - begin, 0), self.capacity)
            self._lower[rows[index]][arm] = max(begin, low)
        return sorted(members), total if verifying is None else min(total, known + verifying)


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Packed features of N committed tokens on their way into a drafter's KV."""

    features: torch.Tensor  # [N, F] as captured, or the columns of one drafter
    positions: torch.Tensor  # [N] int64
    slots: torch.Tensor  # [N] int64 KV slots, -1 of padding
    next_tokens: torch.Tensor  # [N] int64, the token at position + 1

    # For drafters that attend over the text while they ingest. Rows of a request are adjacent and ordered.
    requests: torch.Tensor | None = None  # [N] int64, each row's request row; anything of padding
    slot_table: torch.Tensor | None = None  # [request rows, ctx] int32, request row and position → KV slot
    runs: Sequence[int] | None = None  # rows of each request, on the host; None: the device alone knows

    # Rows whose next position is an image's, [N] bool, and what the target read there, [N, H].
    images: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return int(self.positions.shape[0])

    def of(self, columns: FeatureSlice | None) -> "FeatureRows":
        """Return the rows with the columns of one drafter only; None: unchanged."""
        return self if columns is None else replace(self, features=columns(self.features))

    def embedded(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Embed the token after each row for a drafter, [N, H'], by its `embed`. A position of an image is embedded as
        the target read it if H' is the target's width."""
        tokens = embed(self.next_tokens)
        if self.images is None or self.images[1].shape[1] != tokens.shape[1]:
            return tokens
        where, read = self.images
        return torch.where(where[:, None], read.to(tokens.dtype), tokens)


def columns_of(columns: FeatureSlice | None) -> tuple[tuple[int, ...] | None, int]:
    """Return the column groups that a drafter reads of a captured row, and their width; (None, 0): the whole row."""
    return (None, 0) if columns is None else (columns.chunks, columns.hidden)


class FeatureRings:
    """Bounded per-request rings of captured features and of the tokens that follow them.

    Args:
        rows: request rows. capacity: tokens per request. width: columns of one captured row.
    """

    def __init__(self, rows: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.rings = BacklogRings.allocate(rows, capacity, width, dtype=dtype, device=device)

    @staticmethod
    def bytes_for(rows: int, capacity: int, width: int, dtype: torch.dtype) -> int:
        return rows * capacity * (width * dtype.itemsize + torch.int64.itemsize)

    def park(self, features: torch.Tensor, *packed: torch.Tensor, widest: int) -> None:
        """Store `counts[b]` rows of `features` [T, F], from row `row_starts[b]`, at positions from `begins[b]`.

        packed: the next tokens [T]; request rows, begins, counts and row_starts, [B] each. widest: no count is larger.
        Rings without columns store nothing.
        """
        if self.rings.features.shape[2]:
            park(self.rings, features, *packed, max_length=widest)

    def unpark(
        self,
        request_rows: torch.Tensor,
        begins: torch.Tensor,
        ends: torch.Tensor,
        slot_table: torch.Tensor,
        *,
        rows: int,
        wanted: FeatureSlice | None = None,
        owned: bool = False,
    ) -> FeatureRows:
        """Gather parked positions [begins, ends) of every request into one packed batch.

        Slots are looked up now, since the tree may remap them. Surplus rows are padding, at slot -1.

        Args:
            request_rows, begins, ends: [B] int64. slot_table: [rows, ctx] int32, request row and position → KV slot.
            rows: of the result. wanted: a drafter's columns; None: all. owned: whether rows name their requests.
        """
        chunks, width = columns_of(wanted)
        features, tokens, positions, slots, request_of_row = unpark(
            self.rings, request_rows, begins, ends, slot_table, rows=rows, chunks=chunks, chunk_width=width
        )
        if not owned:
            return FeatureRows(features, positions, slots, tokens)
        requests = request_rows[request_of_row.clamp(min=0)]
        return FeatureRows(features, positions, slots, tokens, requests, slot_table)

    def inputs(
        self,
        members: torch.Tensor | None,
        *batch: torch.Tensor,
        wanted: FeatureSlice | None,
        tail: bool,
        into: PassInputs | None = None,
    ) -> PassInputs:
        """Gather the inputs of a pass for the requests `members` [M] int64 of a batch; None: all, without a copy.

        batch: its request rows, lengths, bonus tokens and limits, [B] int64 each, and the calibration. wanted: the
        drafter's columns; None: all. tail: whether it reads feature n-1. into: a drafter's `place`.
        """
        chunks, width = columns_of(wanted)
        chunks = chunks if tail else ()
        return draft_inputs(self.rings, members, *batch, chunks=chunks, chunk_width=width, into=into, padding=PADDING)
