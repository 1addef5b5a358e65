"""Where a WHIFLASH round's time goes, from what its clock gained. Needs no server."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from whiflash_sglang.telemetry.round_clock import STAGES


class RoundMs(BaseModel):
    """Mean milliseconds of a WHIFLASH round per stage; other: of the round, but in no stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    route: float
    catch_up: float
    draft: float
    verify: float
    commit: float
    park: float
    other: float

    @property
    def total(self) -> float:
        return float(sum(self.model_dump().values()))

    @property
    def overhead(self) -> float:
        """What is neither drafting nor verifying."""
        return self.total - self.draft - self.verify


def round_ms_of(gained: Mapping[str, float]) -> RoundMs:
    """gained: differences of `RoundClock.snapshot`, with at least one round."""
    stages = {name: 1000 * gained[f"{name}_seconds"] / gained["rounds"] for name in STAGES}
    return RoundMs(**stages, other=1000 * gained["round_seconds"] / gained["rounds"] - sum(stages.values()))


def switch_share_of(gained: Mapping[str, float]) -> float:
    """Route, park and the catch-up beyond one round's tokens, as a share of the round."""
    spent = gained["route_seconds"] + gained["park_seconds"] + gained["extra_catch_up_seconds"]
    return spent / gained["round_seconds"]
