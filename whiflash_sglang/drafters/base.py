"""What a drafter is to the worker."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from whiflash_sglang.cache.backlog import FeatureRows


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """The requests of one round that one arm drafts for.

    rows: [B] int64 rows of the request table. lengths: n per request, on the host; starts: the same, [B] int64.
    bonus: [B] int64, token n. tail: [B, F] captured feature n-1. slot_table: [request rows, ctx] int32.
    limits: drafts wanted per request at most, each at least 1 (on the host).
    history: per request, the committed tokens 0..n on the host, read on demand (a copy drafter needs them).
    """

    rows: torch.Tensor
    row_ids: Sequence[int]
    lengths: Sequence[int]
    starts: torch.Tensor
    bonus: torch.Tensor
    tail: torch.Tensor
    slot_table: torch.Tensor
    limits: Sequence[int]
    history: Callable[[int], Sequence[int]]

    def __len__(self) -> int:
        return len(self.lengths)

    def slots(self, offset: int, width: int = 1) -> torch.Tensor:
        """KV slots of positions n+offset … n+offset+width-1: [B, width] int64."""
        positions = self.starts[:, None] + torch.arange(offset, offset + width, device=self.starts.device)
        return self.slot_table[self.rows[:, None], positions].to(torch.int64)


@dataclass(frozen=True, slots=True)
class Drafts:
    """tokens: [B, W] int64, row b holds counts[b] drafts for positions n+1…; what lies beyond is padding."""

    tokens: torch.Tensor
    counts: Sequence[int]


class Drafter(Protocol):
    """One arm.

    Lifecycle: `allocate` once → per request `catch_up` with the prompt's rows, then rounds of `catch_up` and
    `draft` in any order with other arms' rounds between them → `release`.
    """

    arm: str
    max_drafts: int
    """Most drafts it proposes in a round; a verified block is one token wider (the bonus token)."""
    captured_layers: tuple[int, ...]
    """Target layers whose *outputs* it reads; empty for a drafter that needs no features."""
    keeps_kv: bool
    """Whether it has KV that must stay synchronised with the target's slots."""

    def kv_bytes_per_token(self) -> int:
        """Bytes its KV adds to one target slot."""
        ...

    def allocate(self, slots: int) -> None:
        """Allocate KV for `slots` target slots."""
        ...

    def catch_up(self, rows: FeatureRows) -> None:
        """Ingest features KV-only: K and V are written, nothing is attended (KV-only Prefill, arXiv 2606.07710)."""
        ...

    def draft(self, batch: DraftBatch) -> Drafts:
        """Propose tokens. KV writes at positions >= n are provisional."""
        ...

    def release(self, row: int) -> None:
        """The request in `row` is gone."""
        ...
