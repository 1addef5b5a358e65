"""The records that the stages of a round pass on, and the words for lengths. Imports no SGLang.

At the start of a round a request has n committed tokens *with* target KV and features, 0…n-1. Token n is the bonus
token: known, emitted, without KV. Intervals are half-open. KV that a drafter writes at positions >= n is provisional.
B is the number of requests, W a padded width, T a number of packed rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from whiflash_kernels import Chosen, Committed, Drafts, PassInputs, pass_rows
from whiflash_kernels.cpu.texts import Candidates
from whiflash_kernels.structs import PADDING

from whiflash_sglang.device.transfers import Floats
from whiflash_sglang.drafts import arms
from whiflash_sglang.prices.costs import FULL_LENGTH, Worth
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.request import Request
from whiflash_sglang.records.signals import Decision

Due = Mapping[str, tuple[list[int], int]]
"""By arm, the requests of a batch that it has to catch up before a round: their indices in the batch, and the tokens
that it ingests for all of them together, at least 1: exact if the host knows n, else an upper bound.
"""

NumbersT = TypeVar("NumbersT")


class Limits(NamedTuple, Generic[NumbersT]):
    """Largest number of drafts of each request of a round: a list on the host, [B] int64 on the device.

    passes: made by a drafter's pass, 0 without one. joined: made by the pass and by arms that continue it, together; 0
    if no arm may. copied: copied by the device in place of a pass. drafts: from all sources.
    """

    passes: NumbersT
    joined: NumbersT
    copied: NumbersT
    drafts: NumbersT


@dataclass(slots=True, eq=False)
class Plan:
    """The first rank's decisions about a round, made from data that only that rank reads; the other ranks adopt them.

    Lists have a value per request, except undrafted: indices of the requests whose grammar is too slow for drafts.
    asked: arms that were asked for a candidate. routes: the arm whose pass drafts, or `none`. candidates: those that
    may be verified without a pass; None: there are none. priced_as: the route, or `promised` for a candidate; numbers
    of drafts are learned by it.

    worth: accepted tokens that a further draft must bring. usual_drafts: drafts that the round has rows for.
    calibration: by arm, `Drafter.calibration` of every arm that drafts.
    """

    undrafted: list[int]
    asked: list[list[str]]
    worth: Worth
    routes: list[str] = field(init=False)
    candidates: Candidates | None = field(init=False)
    limits: Limits[list[int]] = field(init=False)
    priced_as: list[str] = field(init=False)
    usual_drafts: int = field(init=False)
    calibration: dict[str, Floats] = field(init=False)

    @property
    def speculates(self) -> bool:
        """Whether a model drafts for a request, or a draft source has promised a candidate."""
        return any(arm != arms.NONE for arm in self.priced_as)


@dataclass(eq=False, repr=False)  # a repr would read what no stage has filled, and wait for the device
class Round:
    """One round of a decode batch of B requests. Each stage fills its own fields. Reading a field that is not filled
    yet raises an error, unless it has a default, as some fields of the draft stage have.
    """

    # Filled by `round_batch` (engine/scheduler/spec_worker.py) from SGLang's batch.
    rows: torch.Tensor  # [B] int64, rows of the request table
    row_ids: list[int]  # `rows` on the host
    starts: torch.Tensor  # [B] int64, n
    least: Sequence[int]  # the smallest value that n may have, as far as the host knows
    most: Sequence[int]  # the largest; both are n if no earlier round is under way
    bonus: torch.Tensor  # [B] int64, token n
    reqs: list[Any]  # SGLang's requests, whose token lists the host reads
    # Tokens that each request may commit: those left of its max_new_tokens and of the context. It is 1 if the scheduler
    # must see a token before the next one can be judged. Route lowers some (`take_single`).
    budgets: list[int]

    # Filled by route (round/planning.py).
    requests: list[Request] = field(init=False)  # the controller's; one per request, not per row
    decisions: list[Decision] = field(init=False)
    plan: Plan = field(init=False)
    members: dict[str, list[int]] = field(init=False)  # by arm, indices of the requests that it drafts for
    due: Due = field(init=False)  # by arm, the requests that it catches up

    # The plan on the device. Only `catches_up` is filled if nobody drafts and nobody catches up.
    catches_up: torch.Tensor = field(init=False)  # [arms * B] int64, `DraftSync.flags`
    limits: Limits[torch.Tensor] = field(init=False)
    member_indices: dict[str, torch.Tensor] = field(init=False)  # by arm, [M] int64
    calibration: dict[str, torch.Tensor] = field(init=False)  # by arm, float32
    # The host's candidates and the positions of their first tokens, [B, K] int64; None if there are none.
    host_drafts: tuple[Drafts, torch.Tensor] | None = field(default=None, init=False)

    # Filled by draft (round/draft.py).
    drafts: Drafts = field(init=False)  # drafts of the passes, whether or not they are verified
    chosen: Chosen = field(init=False)  # drafts that are verified; `first_drafts` are of the first arms
    packed_rows: int = field(init=False)  # rows of the verification, at most
    stride: int = field(init=False)  # rows of its widest request, at most
    copies: Drafts | None = field(default=None, init=False)  # made by the device, verified or not

    def __post_init__(self) -> None:
        assert len(self.row_ids) == len(self.reqs) == len(self.least) == len(self.most) == len(self.budgets)

    def __len__(self) -> int:
        return len(self.row_ids)

    def take_single(self, indices: Sequence[int]) -> None:
        """Limit these requests to one token in this round."""
        for index in indices:
            self.budgets[index] = 1

    def history(self, index: int, start: int) -> Sequence[int]:
        """Return the committed tokens of a request from position `start` to n, from the host's lists.

        The newest tokens are missing while an earlier round is under way.
        """
        req = self.reqs[index]
        output = start - len(req.origin_input_ids)
        if output < 0:
            return [*readable(req.origin_input_ids, start), *req.output_ids]
        return list(req.output_ids[output:])

    def answer(self, index: int, start: int) -> Sequence[int]:
        """Return the output tokens of a request from output token `start` on, as `history` knows them."""
        return self.history(index, len(self.reqs[index].origin_input_ids) + start)

    def draft_nothing(self) -> None:
        """Let every request verify only its bonus token: no drafts, one row each."""
        self.drafts, self.chosen = _no_drafts(len(self), self.rows.device)
        self.packed_rows, self.stride = len(self), 1

    @cached_property
    def time(self) -> RoundTime:
        """The round's sizes, by which its time is learned as a price. The draft stage has run before."""
        return RoundTime(
            self.packed_rows,
            len(self),
            sum(self.most),
            {arm: len(members) for arm, members in self.members.items()},
            {arm: tokens for arm, (_, tokens) in self.due.items()},
            {arm: self.decisions[members[0]].limit for arm, members in self.members.items() if members},
        )


@cache
def _no_drafts(requests: int, device: torch.device) -> tuple[Drafts, Chosen]:
    """Make the `Drafts` and `Chosen` of a round without drafts. No stage writes to them, so each size is made once."""
    ones = torch.ones(requests, dtype=torch.int32, device=device)
    none, nothing = ones - 1, torch.empty((requests, 0), device=device)
    tokens = nothing.long()
    return Drafts(tokens, none, nothing, nothing, none), Chosen(tokens, ones, none, none, none)


PLACEHOLDERS = 1_000_000
"""Token ids from here on are SGLang's placeholders at positions of an image: no vocabulary is as large."""


def readable(ids: Sequence[int], start: int = 0) -> Sequence[int]:
    """Return a prompt from position `start` on with ids that drafters may read.

    SGLang writes a hash at every position of an image. Here position p of an image has the id -2 - p, which no other
    position has: nothing matches across an image, and a copy ends before a token below zero.
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
"""`history(start)` lists a request's tokens from position `start` to n, on the host; it costs what it returns."""


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """The requests of one round that one arm drafts for.

    A draft pass depends on the first five tensors, on weights and KV, and on shapes. It reads no value of them on the
    host, so a graph captured for B requests stays right when they are refilled in place. A padding request has row 0
    and `starts` of at most `PADDING`: it attends to nothing and writes to slot 0, which belongs to no request.
    """

    # Inputs of a pass.
    rows: torch.Tensor  # [B] int64, rows of the request table
    starts: torch.Tensor  # [B] int64, n
    bonus: torch.Tensor  # [B] int64, token n
    tail: torch.Tensor  # [B, F], the drafter's columns of feature n-1, F = `Drafter.tail_width`
    slot_table: torch.Tensor  # [request rows, ctx] int32
    longest: int  # upper bound of n over the requests: launches are sized by it

    # Bounds of drafts, and inputs of text drafters.
    caps: torch.Tensor  # [B] int64, largest number of drafts of each request, at least 1
    limits: Sequence[int] = ()  # `caps` on the host
    row_ids: Sequence[int] = ()  # `rows` on the host
    calibration: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # float32, as of `Round`
    worth: Worth = FULL_LENGTH  # what a further draft must bring
    text: torch.Tensor | None = (
        None  # [request rows, ctx or more] int64, tokens up to n; None: this arm reads no text on the device
    )

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of_padding(cls, requests: int, tail: torch.Tensor, slot_table: torch.Tensor, bins: int = 0) -> "DraftBatch":
        """Make a batch of padding requests in memory that no round overwrites: the inputs of captured passes.

        tail: [..., F], of which only width, dtype and device matter. bins: how many numbers a calibration has.
        """
        rows = torch.zeros(requests, dtype=torch.int64, device=slot_table.device)
        starts, tails = torch.full_like(rows, PADDING), tail.new_zeros((requests, tail.shape[-1]))
        longest = int(slot_table.shape[1])
        bonus, caps = torch.zeros_like(rows), torch.zeros_like(rows)
        calibration = torch.zeros(bins, device=slot_table.device)
        return cls(rows, starts, bonus, tails, slot_table, longest, caps, calibration=calibration)

    def place(self, requests: int) -> PassInputs:
        """Return a pass's inputs for the first `requests` requests, with their `caps` and the arm's calibration."""
        parts = self.rows, self.starts, self.bonus, self.caps, self.tail
        return PassInputs._make([*(part[:requests] for part in parts), self.calibration])

    def first(self, requests: int) -> "DraftBatch":
        """Return the batch of the first `requests` requests, in the same memory."""
        rows, starts, bonus, caps, tail, _ = self.place(requests)
        return replace(self, rows=rows, starts=starts, bonus=bonus, tail=tail, caps=caps)

    def rows_from(
        self, offset: int, width: int, fill: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return positions, KV slots and, with a `fill`, ids of rows n+offset … n+offset+width-1 of every request."""
        return pass_rows(self.slot_table, self.rows, self.starts, self.bonus, offset=offset, width=width, fill=fill)


Values = Any
"""A tensor on the device or nested lists on the host; None if the field was not computed."""


class Results(NamedTuple):
    """All that `Learner.learn` and the scheduler read of a round of B requests.

    Shapes are [B] unless stated. starts: int64, n. widths: int32, verified rows. first_drafts: int32, verified drafts
    that are the first arm's. drafts: [B, W] int64, drafts of the passes, whether or not they were verified; drafted:
    int64, how many each request has; confidences: [B, C] float32, one per draft; faults: int32, 1 where a pass's drafts
    were invalid. source: int32, as in `Chosen`. bonus, seq_lens: int64, tokens: [B, W] int64, and accept_lens: int32,
    as in `Committed`. wanted: int32, drafts before requests competed for rows, if they did.
    copies: [B, L] int64, where the device copies; copied: int64, how many each request has; copy_*: as in
    `propose_copies`. entropy, outputs and rates: as in `SignalReader.read`.
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


RatesAsked = Mapping[int, tuple[int, Sequence[int]]]
"""Requests for log-probabilities beside those of the sampled tokens, by the request's index in the batch: how many of
the likeliest tokens at each position, and ids of further tokens.
"""


class Rated(NamedTuple):
    """The requests of a round that asked for log-probabilities. The ids that they name are on the device.

    ids: [A, 1 + I] int64, each request's index and ids, padded with 0. likeliest: upper bound of the likeliest tokens
    that a request asked for. captured: whether a second graph rates them.
    """

    requests: RatesAsked
    ids: torch.Tensor
    likeliest: int
    captured: bool = False


class Verified(NamedTuple):
    """T packed rows of B requests after the target's forward.

    logits: [T, V], the target's raw logits; after penalties changed them, `entropy`, [T], is that of the raw ones.
    features: [T, F], captured layer outputs. final_hidden: [T, H] after the final norm, None unless a router or the
    server's clients may ask for it. input_ids: [T] int64. indptr: [B + 1] int32, where each request's rows begin.
    starts: [B] int64, n. request_rows: [B] int64, rows of the request table. predictions: [T] int64, the target's own
    token at every row; None before sampling, and if the forward's graph has already `committed`. Then `committed` and
    `signals` (`SignalReader.read`) are valid until the graph's next replay. forward: SGLang's own result, from which
    the scheduler's is made. graph: the captured graph that was replayed, by runner, rows and whether each request has
    one row; None if the forward was eager. rated: None if no request asks for log-probabilities. masks: as in
    `sample_rows`; None if the rows have none, or their logits are masked already.
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
    masks: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def output(self) -> Any:
        """Return SGLang's logits record, which carries log-probabilities back to the scheduler."""
        return self.forward.logits_output
