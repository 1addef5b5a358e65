"""What was decided of a round: for the host, for the ranks, and on the device."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from whiflash_kernels import HostDrafts

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


@dataclass(frozen=True, slots=True)
class Plan:
    """One round as it was decided, for B requests.

    routes: arm of each. states: what the controller kept of each, which differs from that of a later request in the
    same row; decisions: what each was decided on. members: indices of the requests of every arm that drafts. due: who
    catches up with whom. limits: drafts of each request's own arm at most, 0 where none drafts. joined: the same with
    those that another arm may put behind them, 0 where none may. copying: drafts that the device may copy in their
    place at most. rooms: drafts of each request at most, whoever's. made_room: drafts that rows are there for
    (`WorkerCosts.room`). voices: what arms that speak say of each request; where the host knows texts late, what may
    take the place of drafts. speakers: these arms, in the order of `from_host`, and last the one that the device drafts
    for. worth: what a further draft of each arm must bring.
    """

    routes: list[str]
    states: list[RequestState]
    decisions: list[Decision]
    members: dict[str, list[int]]
    due: dict[str, Due]
    limits: list[int]
    joined: list[int]
    copying: list[int]
    rooms: list[int]
    made_room: list[float]
    voices: list[dict[str, Voice]]
    speakers: Sequence[str]
    worth: dict[str, Worth]
    on_device: OnDevice

    @property
    def usual_drafts(self) -> int:
        """Drafts that the round has rows for, where the host may not count them."""
        return math.ceil(sum(map(min, self.rooms, self.made_room)))

    def work(self, rows: int, context: int) -> RoundWork:
        """What the round does, for its price; it verifies `rows` rows of requests of `context` tokens together."""
        drafted = {arm: len(members) for arm, members in self.members.items()}
        caught_up = {arm: due.rows for arm, due in self.due.items()}
        return RoundWork(rows, len(self.routes), context, drafted, caught_up)


@dataclass(frozen=True, slots=True)
class Decided:
    """What the first rank decides of a round from what it alone looks at; the others do the same (`Plan` says what).

    asked: arms that were asked what they say of each request. calibration: `Drafter.calibration` of every arm that
    drafts and of the one that the device drafts for.
    """

    routes: list[str]
    asked: list[list[str]]
    limits: list[int]
    joined: list[int]
    copying: list[int]
    made_room: list[float]
    voices: list[dict[str, Voice]]
    worth: dict[str, Worth]
    calibration: dict[str, Floats]
