"""The gain of drafting on a running server: by its counters, against its own prices of rounds without drafts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.top import less

CAVEAT = (
    "Plain seconds are the server's prices of rounds without drafts for the same tokens, not a second run. Prefills "
    "and idle time are in neither. The server keeps no figure of a tenant or an agent: `whiflash_sdk` reports those "
    "(Session, collect)."
)


class Brought(NamedTuple):
    """seconds: of decode rounds. plain_seconds: what they would have taken without drafts. by_arm: tokens."""

    tokens: int
    seconds: float
    plain_seconds: float
    by_arm: Mapping[str, int]

    @property
    def gain(self) -> float:
        return self.plain_seconds / self.seconds

    def as_json(self, hourly: float | None) -> dict[str, Any]:
        """hourly: what an hour of the server costs."""
        rate, plain = self.tokens / self.seconds, self.tokens / self.plain_seconds
        costs = {} if hourly is None else {
            "saved_cost": hourly * (self.plain_seconds - self.seconds) / 3600,
            "cost_per_million_tokens": hourly / 3600 * 1e6 / rate,
            "plain_cost_per_million_tokens": hourly / 3600 * 1e6 / plain,
        }  # fmt: skip
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": rate,
            "plain_tokens_per_second": plain,
            "gain": self.gain,
            **costs,
            "tokens_by_arm": dict(self.by_arm),
        }


def brought(state: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Brought:
    """A server's gain by its state, since an earlier state of it or since its start.

    Raises:
        ConfigError: it was restarted since, or has not decoded enough to have a price.
    """
    if before is not None and before.get("tokens", 0) > state.get("tokens", 0):
        raise ConfigError("the server was restarted after the reading of --since: leave --since out")
    counts = state if before is None else less(state, before)
    seconds, plain = counts.get("timed_seconds", 0.0), counts.get("plain_seconds", 0.0)
    if seconds <= 0 or plain <= 0:
        raise ConfigError("the server has timed no round yet: send it requests, then ask again")
    by_arm = {arm: one["tokens"] for arm, one in (counts.get("by_arm") or {}).items() if one["tokens"]}
    return Brought(counts["tokens"], seconds, plain, by_arm)
