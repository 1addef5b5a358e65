"""What was decided of a round: for the host, for the ranks, and on the device."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from whiflash_kernels import HostDrafts

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import Due
from whiflash_sglang.core import Voice
from whiflash_sglang.device.transfers import Floats
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.routing.request_state import Decision, RequestState
from whiflash_sglang.telemetry.round_clock import RoundWork


@dataclass(frozen=True, slots=True)
class OnDevice:
    """What the device needs of a plan; where nobody drafts and nobody catches up, nothing.

    members: [M] int64 per arm, indices of the batch. due: [arms * B] int64, `DraftSync.flags`. limits, joined, copying,
    rooms: [B] int64, as of `Plan`. calibration: float32 per arm, `Drafter.calibration`. from_host: `Plan.voices`;
    None where nobody says anything, or where the host places them itself.
    """

    members: Mapping[str, torch.Tensor]
    due: torch.Tensor
    limits: torch.Tensor
    joined: torch.Tensor
    copying: torch.Tensor
    rooms: torch.Tensor
    calibration: Mapping[str, torch.Tensor]
    from_host: HostDrafts | None


@dataclass(frozen=True)
class Decided:
    """What the first rank decides of a round of B requests from what it alone looks at; the others do the same.

    single: indices of those whose grammar is too dear for drafts. routes: neural pass of each, or `none`. asked: arms
    that were asked what they say of each. limits: drafts of each request's pass at most, 0 where there is none.
    joined: drafts at most with those that other arms may put behind them, 0 where none may. copying: drafts that the
    device may copy in their place at most. rooms: drafts at most, whoever's. reckoned: what drafts are learned by:
    the route, or that a voice promised something. made_room: drafts that rows are there for (`WorkerCosts.room`).
    voices: what free voices say of each request, as far as it may be verified. worth: what a further draft of each
    arm must bring. calibration: `Drafter.calibration` of every arm that drafts and of the one that the device drafts
    for.
    """

    single: list[int]
    routes: list[str]
    asked: list[list[str]]
    limits: list[int]
    joined: list[int]
    copying: list[int]
    rooms: list[int]
    reckoned: list[str]
    made_room: list[float]
    voices: list[dict[str, Voice]]
    worth: dict[str, Worth]
    calibration: dict[str, Floats]


@dataclass(frozen=True)
class Plan(Decided):
    """One round as it was decided.

    states: what the controller kept of each request, which differs from that of a later request in the same row;
    decisions: what each was decided on. members: indices of the requests of every arm that drafts. due: who catches up
    with whom. speakers: the arms of `voices`, in the order of `from_host`, and last the one that the device drafts for.
    """

    states: list[RequestState]
    decisions: list[Decision]
    members: dict[str, list[int]]
    due: dict[str, Due]
    speakers: Sequence[str]
    on_device: OnDevice

    @property
    def speculates(self) -> bool:
        """Whether anything was promised, or a model drafts."""
        return any(own != arms.NONE for own in self.reckoned)

    @property
    def row_worth(self) -> float:
        """What a verified row must bring, whoever drafts it."""
        return max(worth.row for worth in self.worth.values())

    @property
    def usual_drafts(self) -> int:
        """Drafts that the round has rows for, where the host may not count them."""
        return math.ceil(sum(map(min, self.rooms, self.made_room)))

    def work(self, rows: int, context: int) -> RoundWork:
        """What the round does, for its price; it verifies `rows` rows of requests of `context` tokens together."""
        drafted = {arm: len(members) for arm, members in self.members.items()}
        caught_up = {arm: due.rows for arm, due in self.due.items()}
        return RoundWork(rows, len(self.routes), context, drafted, caught_up)
