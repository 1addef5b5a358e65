"""What was decided of a round: for the host, for the ranks, and on the device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from whiflash_sglang.cache.backlog import Due
from whiflash_sglang.routing.costs import Worth
from whiflash_sglang.routing.request_state import Decision, RequestState
from whiflash_sglang.routing.tables import HEADROOM
from whiflash_sglang.telemetry.round_clock import RoundWork


@dataclass(frozen=True, slots=True)
class OnDevice:
    """What the device needs of a plan; where nobody drafts and nobody catches up, nothing.

    members: [M] int64 per arm, indices of the batch. due: [arms * B] int64, `DraftSync.flags`. limits, joined: [B]
    int64, as of `Plan`. calibration: float32 per arm, `Drafter.calibration`. late_limits: [B] int64, drafts of the late
    arm at most. must_beat: [B] float32, what these must bring (`Controller.must_beat`).
    """

    members: Mapping[str, torch.Tensor]
    due: torch.Tensor
    limits: torch.Tensor
    joined: torch.Tensor
    calibration: Mapping[str, torch.Tensor]
    late_limits: torch.Tensor
    must_beat: torch.Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """One round as it was decided, for B requests.

    routes: arm of each. states: what the controller kept of each, by which a later request in the same row is told from
    it; decisions: what each was decided on. members: indices of the requests of every arm that drafts. due: who catches
    up with whom. limits: drafts of each request's own arm at most, 0 where none drafts. joined: the same with those
    that another arm may put behind them, 0 where none may. late: the arm whose drafts the device may put in any
    request's place, None where the host knows all beforehand; late_limits: their number at most. expected_drafts: of
    each request on average, as it was routed, whoever's and whether or not they were verified. worth: what a further
    draft of each arm must bring.
    """

    routes: list[str]
    states: list[RequestState]
    decisions: list[Decision]
    members: dict[str, list[int]]
    due: dict[str, Due]
    limits: list[int]
    joined: list[int]
    late: str | None
    late_limits: list[int]
    expected_drafts: list[float]
    worth: dict[str, Worth]
    on_device: OnDevice

    @property
    def usual_drafts(self) -> int:
        """Drafts that a round like this one makes room for: more than on average."""
        return sum(
            min(room, math.ceil(HEADROOM * drafts))
            for room, drafts in zip(self.rooms, self.expected_drafts, strict=True)
        )

    def work(self, rows: int, context: int) -> RoundWork:
        """What the round does, for its price; it verifies `rows` rows of requests of `context` tokens together."""
        drafted = {arm: len(members) for arm, members in self.members.items()}
        caught_up = {arm: due.rows for arm, due in self.due.items()}
        return RoundWork(rows, len(self.routes), context, drafted, caught_up)

    @property
    def rooms(self) -> list[int]:
        """Drafts of each request at most."""
        return [max(most) for most in zip(self.limits, self.joined, self.late_limits, strict=True)]


@dataclass(frozen=True, slots=True)
class Decided:
    """What the first rank decides of a round from what it alone looks at; the others do the same (`Plan` says what).

    asked: arms that were asked what they expect of each request. must_beat: what drafts of the late arm must bring, inf
    where they may not. calibration: `Drafter.calibration` of every arm that drafts and of the late one.
    """

    routes: list[str]
    asked: list[list[str]]
    joined: list[int]
    must_beat: list[float]
    expected_drafts: list[float]
    worth: dict[str, Worth]
    calibration: dict[str, list[float]]
