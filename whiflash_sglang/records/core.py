"""The records that a round passes on, and the words for lengths. Imports no SGLang.

At the start of a round a request has n committed tokens *with* target KV and features, 0…n-1. Token n is the bonus
token: known, emitted, without KV. Intervals are half-open. KV that a drafter writes at positions >= n is provisional.
B is the number of requests, W a padded width, T a number of packed rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from whiflash_kernels import Chosen, Committed, Drafts, MixedBlock, PassInputs, pass_rows
from whiflash_kernels.structs import PADDING

from whiflash_sglang.device.transfers import EXACT, Floats, HostView, Upload
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import Candidate, Part
from whiflash_sglang.prices.costs import FULL_LENGTH, Worth
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Decision

Due = Mapping[str, tuple[list[int], int]]
"""Requests of a batch that an arm has to catch up before a round, by arm: their indices, and most tokens that they have
to ingest together, never 0; exactly those if n is known.
"""

NumbersT = TypeVar("NumbersT")


class Limits(NamedTuple, Generic[NumbersT]):
    """Drafts at most, of each request of a round: a list on the host, [B] int64 on the device.

    passes: of its pass, 0 without one. joined: with those that other arms put behind, 0 if none may. copied: that the
    device may copy in their place. drafts: of whatever source.
    """

    passes: NumbersT
    joined: NumbersT
    copied: NumbersT
    drafts: NumbersT


@dataclass(slots=True, eq=False)
class Plan:
    """The first rank's decisions about a round, from what it alone looks at; the others take them over.

    A value a request: undrafted: indices of those whose grammar is too dear for drafts. asked: arms that were asked
    what they propose. routes: neural pass of each, or `none`. candidates: that may be verified without a pass.
    priced_as: what drafts are learned by: the route, or `promised`.

    usual_drafts: drafts that the round has rows for, where the host may not count them.

    A value an arm: worth: what a further draft must bring. calibration: `Drafter.calibration` of all that draft.
    """

    undrafted: list[int]
    asked: list[list[str]]
    worth: dict[str, Worth]
    routes: list[str] = field(init=False)
    candidates: list[dict[str, Candidate]] = field(init=False)
    limits: Limits[list[int]] = field(init=False)
    priced_as: list[str] = field(init=False)
    usual_drafts: int = field(init=False)
    calibration: dict[str, Floats] = field(init=False)

    @property
    def speculates(self) -> bool:
        """Whether anything was promised, or a model drafts."""
        return any(arm != arms.NONE for arm in self.priced_as)

    @property
    def row_worth(self) -> float:
        """Tokens that a verified row must bring, whichever arm drafts it."""
        return max(worth.row for worth in self.worth.values())


@dataclass(eq=False, repr=False)  # a repr would read what no stage has filled, and wait for the device
class Round:
    """One round of a decode batch of B requests. Each stage fills its part of it. A part that no stage has filled yet
    cannot be read, but for the last of draft and verify, which most rounds leave out.
    """

    # Filled by `round_batch` or `next_round` (engine/scheduler/spec_worker.py), of SGLang's batch.
    rows: torch.Tensor  # [B] int64, rows of the request table
    row_ids: list[int]  # the same on the host
    starts: torch.Tensor  # [B] int64, n
    least: Sequence[int]  # the lowest that n may be, as far as the host knows
    most: Sequence[int]  # the highest; the same number if nothing is under way
    bonus: torch.Tensor  # [B] int64, token n
    reqs: list[Any]  # SGLang's requests, for host-side history
    # Tokens that each may commit: what is left of its max_new_tokens and of the context, and one if its next token
    # cannot be judged before the scheduler has seen this one. Route lowers some (`take_single`).
    budgets: list[int]
    ahead: list[list[int]]  # tokens that each committed in earlier rounds of this step

    # Filled by route (round/planning.py).
    requests: list[Request] = field(init=False)  # of the controller; a later one in the row is another
    decisions: list[Decision] = field(init=False)
    plan: Plan = field(init=False)
    members: dict[str, list[int]] = field(init=False)  # by arm, indices of the requests that it drafts for
    due: Due = field(init=False)  # which requests it catches up

    # The same on the device; nothing but `catches_up` if nobody drafts and nobody catches up.
    catches_up: torch.Tensor = field(init=False)  # [arms * B] int64, `DraftSync.flags`
    limits: Limits[torch.Tensor] = field(init=False)
    member_indices: dict[str, torch.Tensor] = field(init=False)  # by arm, [M] int64
    calibration: dict[str, torch.Tensor] = field(init=False)  # by arm, float32
    # Candidates of the host, and positions of their first tokens, [B, K] int64; None if the host places them itself.
    host_drafts: tuple[Drafts, torch.Tensor] | None = field(default=None, init=False)

    # Filled by draft (round/draft.py).
    drafts: Drafts = field(init=False)  # of the passes, whether or not they are verified
    chosen: Chosen = field(init=False)  # what is verified; `first_drafts` are of each request's first arm
    packed_rows: int = field(init=False)  # rows of the verification,
    stride: int = field(init=False)  # and of its widest request: bounds, if the host may not count the widths
    bounded: bool = field(default=False, init=False)  # whether they are, and the requests competed for rows
    parts: Sequence[Sequence[Part]] | None = field(default=None, init=False)  # of drafts that the host read
    copies: Drafts | None = field(default=None, init=False)  # by the device, whether or not they are verified

    def __post_init__(self) -> None:
        assert (
            len(self.row_ids)
            == len(self.reqs)
            == len(self.least)
            == len(self.most)
            == len(self.budgets)
            == len(self.ahead)
        )

    def __len__(self) -> int:
        return len(self.row_ids)

    def take_single(self, indices: Sequence[int]) -> None:
        """Let these requests commit one token, and end the step after it."""
        for index in indices:
            self.budgets[index] = 1

    def history(self, index: int, start: int) -> Sequence[int]:
        """Committed tokens from position `start` to n of a request, from the host's lists.

        The newest are missing while a round is under way.
        """
        req, ahead = self.reqs[index], self.ahead[index]
        output = start - len(req.origin_input_ids)
        if output < 0:
            return [*readable(req.origin_input_ids, start), *req.output_ids, *ahead]
        return [*req.output_ids[output:], *ahead[max(output - len(req.output_ids), 0) :]]

    def answer(self, index: int, start: int) -> Sequence[int]:
        """The same of its output, from output token `start` on."""
        return self.history(index, len(self.reqs[index].origin_input_ids) + start)

    def draft_nothing(self) -> None:
        """Every request verifies its bonus token."""
        self.drafts, self.chosen = _no_drafts(len(self), self.rows.device)
        self.packed_rows, self.stride = len(self), 1

    def timed(self) -> RoundTime:
        """Its sizes and times, for its price."""
        return RoundTime(
            self.packed_rows,
            len(self),
            sum(self.most),
            {arm: len(members) for arm, members in self.members.items()},
            {arm: tokens for arm, (_, tokens) in self.due.items()},
        )


@cache
def _no_drafts(requests: int, device: torch.device) -> tuple[Drafts, Chosen]:
    """Drafts and choice of so many requests that have none. Nobody writes to them, so each size is made once."""
    ones = torch.ones(requests, dtype=torch.int32, device=device)
    none, nothing = ones - 1, torch.empty((requests, 0), device=device)
    tokens = nothing.long()
    return Drafts(tokens, none, nothing, nothing, none, passes=0), Chosen(tokens, ones, none, none, none)


PLACEHOLDERS = 1_000_000
"""Ids from here on are positions of an image: SGLang starts with no vocabulary of so many."""


def readable(ids: Sequence[int], start: int = 0) -> Sequence[int]:
    """A prompt from position `start` on, as drafters may read it.

    SGLang writes a hash over the positions of an image. Here position p of one has the id -2 - p, which no other
    position has: nothing matches across it, and a copy ends before a token below zero.
    """
    tail = ids[start:]
    numbers = np.array(tail, dtype=np.int64)
    places = np.flatnonzero(numbers >= PLACEHOLDERS)
    if not len(places):
        return tail
    numbers[places] = -2 - start - places
    unique: list[int] = numbers.tolist()
    return unique


History = Callable[[int], Sequence[int]]
"""`history(start)`: a request's committed tokens from position `start` to n, on the host; costs what it returns."""


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """The requests of one round that one arm drafts for.

    A draft pass is a function of the first tensors, of weights and KV, and of shapes. It reads no value of them on the
    host, so a capture of B requests stays right when they are refilled in place: a padding request has row 0 and
    `starts` of at most `PADDING`, sees nothing, and writes to slot 0, which belongs to nobody.
    """

    # Inputs of a pass.
    rows: torch.Tensor  # [B] int64, rows of the request table
    starts: torch.Tensor  # [B] int64, n
    bonus: torch.Tensor  # [B] int64, token n
    tail: torch.Tensor  # [B, F], the drafter's columns of feature n-1, F = `Drafter.tail_width`
    slot_table: torch.Tensor  # [request rows, ctx] int32
    longest: int  # the largest n at most, n itself where `host.exact`: it sizes launches

    # Bounds of drafts, and inputs of text drafters.
    caps: torch.Tensor  # [B] int64, drafts wanted at most, each at least 1
    limits: Sequence[int] = ()  # the same on the host
    row_ids: Sequence[int] = ()  # `rows` on the host
    calibration: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # float32, as of `Round`
    worth: Worth = FULL_LENGTH  # what a further draft must bring
    host: HostView = EXACT  # what the arm may read while it drafts
    text: torch.Tensor | None = (
        None  # [request rows, ctx or more] int64, tokens up to n; None: nothing is looked up
    )

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of_padding(
        cls, requests: int, tail: torch.Tensor, slot_table: torch.Tensor, bins: int = 0
    ) -> "DraftBatch":
        """So many requests that are none, at a place that no round writes over: the inputs of captured passes.

        tail: [..., F], of which only width, dtype and device matter. bins: numbers of a calibration.
        """
        rows = torch.zeros(requests, dtype=torch.int64, device=slot_table.device)
        starts, tails = torch.full_like(rows, PADDING), tail.new_zeros((requests, tail.shape[-1]))
        longest = int(slot_table.shape[1])
        bonus, caps = torch.zeros_like(rows), torch.zeros_like(rows)
        calibration = torch.zeros(bins, device=slot_table.device)
        return cls(rows, starts, bonus, tails, slot_table, longest, caps, calibration=calibration)

    def place(self, requests: int) -> PassInputs:
        """Inputs of the first so many requests, with the most drafts of each, and what these are cut by."""
        parts = self.rows, self.starts, self.bonus, self.caps, self.tail
        return PassInputs._make([*(part[:requests] for part in parts), self.calibration])

    def first(self, requests: int) -> "DraftBatch":
        """Inputs of a pass for the first so many requests, in the same memory."""
        rows, starts, bonus, caps, tail, _ = self.place(requests)
        return replace(self, rows=rows, starts=starts, bonus=bonus, tail=tail, caps=caps)

    def rows_from(
        self, offset: int, width: int, fill: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rows at n+offset … n+offset+width-1 of every request: positions and KV slots; ids where there is a `fill`."""
        return pass_rows(
            self.slot_table, self.rows, self.starts, self.bonus, offset=offset, width=width, fill=fill
        )


class SampleHook:
    """A hook replaces sampled tokens, for measurements (`round/forcing.py`); a server has none unless asked."""

    def begin(self, upload: Upload, row: int, req: Any) -> None:
        """A request begins in `row`, or begins again; what the device needs of it goes there with `upload`."""

    def prefilled(self, reqs: Sequence[Any], ends: Sequence[int], sampled: torch.Tensor) -> torch.Tensor:
        """In place of what prefills `sampled`, [B], for the positions `ends`."""
        return sampled

    def verified(self, verified: "Verified", block: MixedBlock) -> "Verified":
        """In place of what was sampled at the rows of `block`."""
        return verified


Values = Any
"""A tensor on the device, nested lists on the host; None where it was not computed."""


class Results(NamedTuple):
    """All that `Learner.learn` and the scheduler read of a round of B requests.

    Ints are [B] if nothing else is said. starts: int64, n. widths: int32, verified rows. first_drafts: int32, how many
    of the verified drafts are the first arm's. drafts: [B, W] int64, of the passes, of which `drafted`, int64, count,
    whether or not they were verified; confidences: [B, C] float32, theirs; faults: int32, 1 where a pass's drafts were
    none. source: int32, as of `Chosen`. bonus, seq_lens: int64, and tokens: [B, W] int64, of which `accept_lens`,
    int32, count, as of `Committed`. wanted: int32, drafts before the bound on rows was kept to, where there is one.
    copies: [B, L] int64, of which `copied`, int64, count, and what is known of them, as of `propose_copies`, where the
    device copies. entropy, outputs and rates: as of `Epilogue.signals`.
    """

    starts: Values
    widths: Values
    first_drafts: Values
    drafts: Values
    drafted: Values
    source: Values
    bonus: Values
    seq_lens: Values
    tokens: Values
    accept_lens: Values
    confidences: Values
    faults: Values
    wanted: Values = None
    copies: Values = None
    copied: Values = None
    copy_alive: Values = None
    copy_matched: Values = None
    copy_agreements: Values = None
    entropy: Values = None
    outputs: Values = None
    rates: Values = None


class Asked(NamedTuple):
    """Log-probabilities that a request asks for, beside those of its tokens. request: its index in the batch.
    likeliest: of so many tokens that are likeliest there. ids: of these tokens.
    """

    request: int
    likeliest: int
    ids: Sequence[int]


class Rated(NamedTuple):
    """Requests of a round whose log-probabilities are wanted, and where the device reads that.

    asked: [A, 1 + I] int64, the index of each, and `ids`, 0 behind them. likeliest: the most that any wants, at least.
    captured: the end of a graph rates them. masks: as of `sample_rows`, where the logits have none.
    """

    requests: Sequence[Asked]
    asked: torch.Tensor
    likeliest: int
    captured: bool
    masks: tuple[torch.Tensor, torch.Tensor] | None = None


class Verified(NamedTuple):
    """T packed rows of B requests behind the target's forward.

    logits: [T, V], the target's raw logits, or those that tokens were sampled from, with the raw ones' `entropy`, [T].
    features: [T, F], captured layer outputs. final_hidden: [T, H] after the final norm, None unless a router or the
    server's clients may ask for it. input_ids: [T] int64. indptr: [B + 1] int32, where each request's rows begin.
    starts: [B] int64, n. request_rows: [B] int64, rows of the request table. predictions: [T] int64, the target's own
    token at every row; None before it is known, and where the forward's graph has `committed` already, with the signals
    that it computed (`Epilogue.signals`): these are good until its next replay. forward: SGLang's own result of it,
    from which the scheduler's is made. graph: the one that was replayed for it, if any, by its runner, rows, and
    whether each request has one. rated: None if nobody asks for log-probabilities.
    """

    logits: torch.Tensor
    features: torch.Tensor
    final_hidden: torch.Tensor | None
    input_ids: torch.Tensor
    indptr: torch.Tensor
    starts: torch.Tensor
    request_rows: torch.Tensor
    predictions: torch.Tensor | None = None
    committed: Committed | None = None
    signals: Mapping[str, torch.Tensor] = {}
    forward: Any = None
    graph: tuple[int, int, bool] | None = None
    entropy: torch.Tensor | None = None
    rated: Rated | None = None

    @property
    def output(self) -> Any:
        """SGLang's record of the logits, which carries log-probabilities back to the scheduler."""
        return self.forward.logits_output
