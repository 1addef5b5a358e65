"""What a drafter is to the worker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.cache.features import FeatureSlice
from whiflash_sglang.lookup.memory import Tenant
from whiflash_sglang.round.graphs import Recorder
from whiflash_sglang.round.host_view import EXACT, HostView
from whiflash_sglang.routing.costs import FULL_LENGTH, Worth
from whiflash_sglang.routing.signals import Outlook
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.structure.matchers import Grammar

if TYPE_CHECKING:
    from whiflash_sglang.drafters.paged import PassInput

History = Callable[[int], Sequence[int]]
"""`history(start)`: a request's committed tokens from position `start` to n, on the host; costs what it returns."""


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """The requests of one round that one arm drafts for.

    rows: [B] int64 rows of the request table; row_ids: the same on the host. starts: [B] int64, n per request; lengths:
    on the host, the most that each n can be, n itself where `host.exact`. bonus: [B] int64, token n. tail: [B, F]
    its columns of feature n-1, F = `Drafter.tail_width`. slot_table: [request rows, ctx] int32.
    limits: drafts wanted per request at most, each at least 1, on the host; caps: [B] int64, the same on the device.
    calibration: float32, what `Drafter.calibration` was
    when the round was planned. worth: what a further draft must bring. host: what it may read while it drafts. text:
    [request rows, ctx or more] int64, token at every position up to n; None where nobody looks anything up.
    """

    rows: torch.Tensor
    row_ids: Sequence[int]
    lengths: Sequence[int]
    starts: torch.Tensor
    bonus: torch.Tensor
    tail: torch.Tensor
    slot_table: torch.Tensor
    limits: Sequence[int]
    caps: torch.Tensor
    calibration: torch.Tensor
    worth: Worth = FULL_LENGTH
    host: HostView = EXACT
    text: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.row_ids)


@dataclass(frozen=True, slots=True)
class Drafts:
    """What an arm drafted; all of it stays on the device.

    tokens: [B, W] int64, row b holds counts[b] drafts for positions n+1…; what lies beyond is padding. counts: [B]
    int64. alive: [B, W] float32, chance that a draft and all before it are accepted; None where the arm cannot say.
    confidences: [B, W] float32, what `observe` is given back; None where it needs none. passes: forward passes of the
    drafter's model that they took; 0: there is none, and no price but that of rows. after: [B] int64, of drafts that
    prolong another arm's, how many of those they follow; None: all.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    alive: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    passes: int = 1
    after: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Grown:
    """Drafts of a whole batch that another arm may prolong.

    batch: as that arm's own, with all requests. rooms: tokens per request at most, its `drafts` included, on the host,
    0 where nothing may follow them; caps: [B] int64, the same on the device.
    """

    batch: DraftBatch
    drafts: Drafts
    rooms: Sequence[int]
    caps: torch.Tensor


class Drafter(ABC):
    """One arm.

    Lifecycle: `allocate` once → per request `catch_up` with the prompt's rows, then rounds of `catch_up` and
    `draft` in any order with other arms' rounds between them → `release`.

    arm: its name. max_drafts: most drafts of a round; a verified block is one token wider (the bonus token).
    captured_layers: target layers whose *outputs* it reads; empty for a drafter that needs no features. features:
    where these lie in what the target captures, None: they are all of it. tail_width: columns of feature n-1 that a
    draft begins with, 0 where it reads none. keeps_kv: whether it has KV that must stay synchronised with the target's
    slots. attends_text: whether it attends over a request's text while it ingests: then rows must say whose they are.
    judges: whether its drafts say how likely they are (`Drafts.alive`); only such are prolonged. prolongs: whether it
    can go on where another arm's drafts end. forbids: whether it drops of them what may not follow. late:
    whether the host knows what it expects of a round too late where it may not read the device; then it drafts for all
    requests, and the device decides who takes its drafts.
    """

    arm: str
    max_drafts: int
    captured_layers: tuple[int, ...] = ()
    features: FeatureSlice | None = None
    tail_width: int = 0
    keeps_kv: bool = False
    attends_text: bool = False
    judges: bool = False
    prolongs: bool = False
    forbids: bool = False
    late: bool = False

    def kv_bytes_per_token(self) -> int:
        """Bytes its KV adds to one target slot."""
        return 0

    def bytes_for(self, rows: int) -> int:
        """What it keeps for so many rows of the request table, beside its KV."""
        return 0

    def captured_bytes(self, requests: int) -> int:
        """What a captured draft of so many requests takes at its peak."""
        return 0

    def allocate(self, slots: int) -> None:  # noqa: B027 - a drafter without KV has nothing to do
        """Allocate KV for `slots` target slots."""

    def capture(  # noqa: B027 - a drafter without a model has no pass to capture
        self, recorder: Recorder, given: "PassInput"
    ) -> None:
        """Have `draft` captured for groups of up to as many requests as `given` has, whose memory captures read.

        Raises ConfigError where it cannot be captured.
        """

    def catch_up(self, rows: FeatureRows) -> None:  # noqa: B027 - a drafter without KV has nothing to do
        """Ingest features KV-only: K and V are written, nothing is drafted (KV-only Prefill, arXiv 2606.07710).

        rows: with the columns of `features` only, and with their owners where it `attends_text`.
        """

    def outlook(self, row: int, length: int, history: History, worth: Worth) -> Outlook | None:
        """What it says of the next round, asked in every round that may be its own, whoever drafts it then.

        None: it cannot say before it drafts. Who says it has looked by then: `draft` takes no pass and no time to speak
        of, and what was committed since its last look, whoever drafted that, shows how right it would have been.

        Args:
            row: of the request table. length: n. history: the request's committed tokens. worth: what a further draft
                must bring.
        """
        return None

    def begin(
        self,
        row: int,
        hints: RequestHints,
        tenant: Tenant | None,
        predicted: Sequence[int] | None = None,
        grammar: Grammar | None = None,
        prompt: int = 0,
    ) -> None:
        """A request begins in `row`, or begins again after a retraction.

        Args:
            tenant: who may share text with it. predicted: tokens of the answer that its caller expects. grammar: what
                constrains it. prompt: tokens of its text before the answer.
        """
        self.release(row)

    def serves(self, row: int) -> bool:
        """Whether the request in `row` lets it draft at all."""
        return True

    @abstractmethod
    def draft(self, batch: DraftBatch) -> Drafts:
        """Propose tokens. KV writes at positions >= n are provisional."""

    def prolong(self, grown: Grown) -> Drafts | None:
        """Tokens to verify behind another arm's drafts, at no pass of a model; asked if it `prolongs`. None: none, and
        those stay as they are.
        """
        return None

    def calibration(self, row_ids: Sequence[int]) -> Sequence[float]:
        """What its drafts for the requests in `row_ids` are judged by, uploaded with the round's plan."""
        return ()

    def source(self, row: int) -> str:
        """What its newest drafts for the request in `row` were taken from, as traces call it."""
        return self.arm

    def observe(  # noqa: B027 - most learn nothing online
        self, row: int, proposed: int, accepted: int, confidences: Sequence[float]
    ) -> None:
        """`accepted` of its `proposed` drafts of a round were right, which it drafted with these `confidences`.

        What a caller ordered is not told.
        """

    def finish(self, row: int, output: Sequence[int]) -> None:  # noqa: B027 - most keep no text
        """The request in `row` ended with `output`; `release` follows."""

    def forget(self, handle: int | None) -> None:  # noqa: B027 - most keep no text
        """Drop text kept across requests: of the tenant, or of the scope in it, with this handle, or of all."""

    def host_bytes(self) -> Mapping[str, int]:
        """What it keeps on the host, by scope; empty for most."""
        return {}

    def snapshot(self) -> Mapping[str, Any]:
        """Its part of the server's state; empty for most."""
        return {}

    def release(self, row: int) -> None:  # noqa: B027 - most keep nothing per request
        """The request in `row` is gone, or another begins there."""


def widest_of(drafters: Mapping[str, Drafter]) -> int:
    """Most drafts of a round, whoever drafts them."""
    return max((drafter.max_drafts for drafter in drafters.values()), default=0)
