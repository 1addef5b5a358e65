"""The records that a round passes on, and the words for lengths. Imports no SGLang.

At the start of a round a request has n committed tokens *with* target KV and features, 0…n-1. Token n is the bonus
token: known, emitted, without KV. Intervals are half-open. What a drafter writes at positions >= n is provisional.
B is the number of requests, W a padded width, T a number of packed rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from whiflash_kernels import Chosen, Committed, Copies, Drafts, MixedBlock, PassRows, pass_rows

from whiflash_sglang.device.capture import StaticInput
from whiflash_sglang.device.transfers import EXACT, HostView, Upload
from whiflash_sglang.routing.costs import FULL_LENGTH, Worth
from whiflash_sglang.routing.signals import Forecast
from whiflash_sglang.telemetry.trace import Part, first_of


class Lengths(NamedTuple):
    """What the host knows of n, per request: at least, and at most. The same where nothing is under way."""

    least: Sequence[int]
    most: Sequence[int]


@dataclass(frozen=True)
class RoundBatch:
    """A decode batch in this package's terms.

    rows: [B] int64 rows of the request table; row_ids: the same on the host. starts: [B] int64, n per request;
    lengths: what the host knows of them. bonus: [B] int64, token n. reqs: SGLang's requests, for host-side history.
    budgets: tokens that each request may commit in one round: what is left of its own max_new_tokens and of the
    context, and one where its next token cannot be judged before the scheduler has seen this one.
    ahead: tokens that each request committed in earlier rounds of this step. spare: rows of the request table that
    nobody has, for strands. chain_only: requests that take none.
    """

    rows: torch.Tensor
    row_ids: list[int]
    starts: torch.Tensor
    lengths: Lengths
    bonus: torch.Tensor
    reqs: list[Any]
    budgets: list[int]
    ahead: list[list[int]]
    spare: Sequence[int] = ()
    chain_only: Sequence[bool] = ()

    @cached_property
    def names(self) -> list[tuple[int, str]]:
        """Row and id of each request: a row alone may be another's by the time that its round's results are known."""
        return [(row, req.rid) for row, req in zip(self.row_ids, self.reqs, strict=True)]

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
            return [*req.origin_input_ids[start:], *req.output_ids, *ahead]
        return [*req.output_ids[output:], *ahead[max(output - len(req.output_ids), 0) :]]

    def answer(self, index: int, start: int) -> Sequence[int]:
        """The same of its output, from output token `start` on."""
        return self.history(index, len(self.reqs[index].origin_input_ids) + start)


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


class Voice(NamedTuple):
    """What may follow a request's text. alive: for each token, the chance that it and all before it are accepted.
    parts: what they were taken from. at: the position of the first, where a text was as far as it was known.
    """

    tokens: Sequence[int] = ()
    alive: Sequence[float] = ()
    parts: Sequence[Part] = ()
    at: int = 0

    def first(self, count: int) -> "Voice":
        """Its first `count` tokens."""
        parts = list(first_of(self.parts, count))
        return Voice(self.tokens[:count], self.alive[:count], parts, self.at)

    def followed_by(self, tokens: Sequence[int], alive: Sequence[float], source: str) -> "Voice":
        """With these tokens behind it, taken from `source`."""
        if not tokens:
            return self
        parts = [*self.parts, Part(source, len(tokens))]
        return Voice([*self.tokens, *tokens], [*self.alive, *alive], parts, self.at)

    def sound(self, vocabulary: int) -> "Voice":
        """Its first tokens, as far as each is one of `vocabulary` ids and has a chance that is a number."""
        if not self.tokens or (
            min(self.tokens) >= 0 and max(self.tokens) < vocabulary and sum(self.alive) >= 0
        ):
            return self
        pairs = zip(self.tokens, self.alive, strict=True)
        bad = (i for i, (token, alive) in enumerate(pairs) if not 0 <= token < vocabulary or alive != alive)
        return self.first(next(bad, len(self.tokens)))

    def gain(self, worth: float) -> float:
        """What verifying it is expected to bring, if a row must bring `worth`."""
        return sum(self.alive) - worth * len(self.alive)

    def outlook(self, most: int | None = None) -> Forecast:
        """What verifying it, or its first `most` tokens, promises."""
        alive = self.alive[:most]
        return Forecast(1 + sum(alive), 1 + len(alive))


SILENCE = Voice()


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens that both begin with."""
    for number, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other:
            return number
    return min(len(ours), len(theirs))


PADDING = -(1 << 20)
"""`starts` of a padding request: before position 0 at whatever step."""


class PassInput(NamedTuple):
    """All that a draft pass reads, beside weights and KV: device tensors, and one host bound that sizes launches.

    A pass is a function of these and of shapes. It reads no value of them on the host, so a capture of G requests stays
    right when the tensors are refilled in place: a padding request has row 0 and `starts` of at most `PADDING`, sees
    nothing, and writes to slot 0, which belongs to nobody.

    rows: [G] int64 rows of `slot_table`. starts: [G] int64, n per request. bonus: [G] int64, token n.
    tail: [G, F] the drafter's columns of feature n-1, F its `tail_width`. slot_table: [request rows, ctx] int32.
    longest: the largest n at most.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    bonus: torch.Tensor
    tail: torch.Tensor
    slot_table: torch.Tensor
    longest: int

    @classmethod
    def of(cls, batch: DraftBatch) -> "PassInput":
        """The device's part of a batch."""
        return cls(batch.rows, batch.starts, batch.bonus, batch.tail, batch.slot_table, max(batch.lengths))

    @classmethod
    def of_padding(cls, requests: int, tail: torch.Tensor, slot_table: torch.Tensor) -> "PassInput":
        """So many requests that are none, at a place that no round writes over: the inputs of captured passes.

        tail: [..., F], of which only width, dtype and device matter.
        """
        device = slot_table.device
        rows = torch.zeros(requests, dtype=torch.int64, device=device)
        return cls(
            rows,
            torch.full_like(rows, PADDING),
            torch.zeros_like(rows),
            tail.new_zeros((requests, tail.shape[-1])),
            slot_table,
            int(slot_table.shape[1]),
        )

    @property
    def static(self) -> list[StaticInput]:
        """What is loaded before a replay: `rows`, `starts`, `bonus` and `tail`."""
        return [
            StaticInput(self.rows, torch.zeros_like(self.rows)),
            StaticInput(self.starts, torch.full_like(self.starts, PADDING)),
            StaticInput(self.bonus),
            StaticInput(self.tail),
        ]

    def first(self, requests: int) -> "PassInput":
        """The first so many requests, in the same memory."""
        rows, starts, bonus, tail, slot_table, longest = self
        return PassInput(
            rows[:requests], starts[:requests], bonus[:requests], tail[:requests], slot_table, longest
        )

    def rows_from(self, offset: int, width: int, fill: int | None = None) -> PassRows:
        """Rows at n+offset … n+offset+width-1 of every request: positions and KV slots; ids where there is a `fill`."""
        return pass_rows(
            self.slot_table, self.rows, self.starts, self.bonus, offset=offset, width=width, fill=fill
        )


class Strand(NamedTuple):
    """One further chain of a request, verified beside its first one (`round/strands.py`).

    owner: its request, an index of the batch. fork: drafts of the first chain that it shares. tokens: its own, whose
    first is not the first chain's next draft. first_row: its rows' place behind the first row of its request. chance:
    that its first token is accepted. source: what it was taken from.
    """

    owner: int
    fork: int
    tokens: Sequence[int]
    first_row: int
    chance: float
    source: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts of a whole batch, on their way to the target.

    chosen: those that are verified; `own` counts those of each request's own arm. drafts: of the own arms, whether or
    not they are verified. rows: of the verification; stride: of its widest request. Both are what the widths come to
    where the host may know them, else bounds, and the requests competed for rows (`bounded`). parts: the
    sources of each request's laid drafts, if the host knows them. strands: further chains of requests; `rows` and
    `stride` count them. copies: that the device made of every request's text, whether or not they are verified.
    """

    chosen: Chosen
    drafts: Drafts
    rows: int
    stride: int
    bounded: bool = False
    parts: Sequence[Sequence[Part]] | None = None
    strands: Sequence[Strand] = ()
    copies: Copies | None = None

    @classmethod
    def of_nothing(cls, rows: torch.Tensor) -> "Proposal":
        """Every request verifies its bonus token. rows: [B] int64."""
        ones = torch.ones_like(rows, dtype=torch.int32)
        none, nothing = ones - 1, torch.empty((len(rows), 0), device=rows.device)
        tokens = nothing.long()
        drafts = Drafts(tokens, none, nothing, nothing, none, passes=0)
        return cls(Chosen(tokens, ones, none, none, none), drafts, len(rows), 1)

    @property
    def rows_each(self) -> torch.Tensor:
        """[B] int32, rows that each request verifies, its strands' among them."""
        widths = self.chosen.widths
        if not self.strands:
            return widths
        owners = torch.tensor([strand.owner for strand in self.strands], device=widths.device)
        rows = [len(strand.tokens) for strand in self.strands]
        return widths.index_add(0, owners, widths.new_tensor(rows))


class SampleHook:
    """What replaces sampled tokens, for measurements (`round/hooks.py`); a server has none unless one asks for it.

    one_chain: whether it takes the packed rows of a request for one chain, so that no strands are made.
    """

    one_chain = False

    def begin(self, upload: Upload, row: int, req: Any) -> None:
        """A request begins in `row`, or begins again; what the device needs of it goes there with `upload`."""

    def prefilled(self, reqs: Sequence[Any], ends: Sequence[int], sampled: torch.Tensor) -> torch.Tensor:
        """In place of what prefills `sampled`, [B], for the positions `ends`."""
        return sampled

    def verified(self, verified: "Verified", block: MixedBlock) -> "Verified":
        """In place of what was sampled at the rows of `block`, whose `request_of_row` is a request of the batch."""
        return verified


class Outcome(NamedTuple):
    """What the end of a verification's graph committed, until its next replay. signals: as of `Epilogue.signals`."""

    committed: Committed
    signals: Mapping[str, torch.Tensor]

    def of(self, requests: int) -> "Outcome":
        """The same of the first so many requests."""
        return Outcome(
            Committed(*(field[:requests] for field in self.committed)),
            {name: signal[:requests] for name, signal in self.signals.items()},
        )


class Verified(NamedTuple):
    """T packed rows of B requests behind the target's forward.

    logits: [T, V], the target's raw logits. features: [T, F], captured layer outputs. final_hidden: [T, H] after the
    final norm, None unless a router or the server's clients may ask for it. input_ids: [T] int64. indptr: [B + 1]
    int32, where each request's rows begin. starts: [B] int64, n. request_rows: [B] int64, rows of the request table.
    predictions: [T] int64, the target's own token at every row; None before it is known, and where the forward's graph
    has brought the `outcome`. forward: SGLang's own result of it, from which the scheduler's is made. strands: each,
    with how many of its tokens were right: 0 where it lost.
    """

    logits: torch.Tensor
    features: torch.Tensor
    final_hidden: torch.Tensor | None
    input_ids: torch.Tensor
    indptr: torch.Tensor
    starts: torch.Tensor
    request_rows: torch.Tensor
    predictions: torch.Tensor | None = None
    outcome: Outcome | None = None
    forward: Any = None
    strands: Sequence[tuple[Strand, int]] = ()

    @property
    def output(self) -> Any:
        """SGLang's record of the logits, which carries log-probabilities back to the scheduler."""
        return self.forward.logits_output
