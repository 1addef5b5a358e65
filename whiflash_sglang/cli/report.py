"""The gain of drafting: of running servers, by their counters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from whiflash_sglang.cli.top import less
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.hosts import replicas_of

CAVEAT = (
    "Plain seconds are the server's prices of rounds without drafts for the same tokens, not a second run. Prefills "
    "and idle time are in neither. Figures of a tenant or an agent are in OpenTelemetry spans and in "
    "`whiflash_sdk` (Session, collect)."
)

COUNTED = ("tokens", "timed_tokens", "timed_seconds", "plain_seconds", "by_arm")
"""Entries of a server's state that a report reads."""


class Brought(NamedTuple):
    """seconds: of decode rounds, at the pace of those that were timed. plain_seconds: what they would have taken
    without drafts. by_arm: tokens.
    """

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
    if before and any(before[name] > state.get(name, 0) for name in COUNTED[:4]):
        raise ConfigError("the server was restarted after the reading of --since: leave --since out")
    counts, replicas = state if before is None else less(state, before), replicas_of(state)
    tokens, timed, seconds, plain = (counts.get(name) or 0 for name in COUNTED[:4])
    if min(tokens, timed, seconds, plain) <= 0:
        raise ConfigError("the server has timed no round yet: send it requests, then ask again")
    by_arm = {arm: sums["tokens"] for arm, sums in (counts.get("by_arm") or {}).items() if sums["tokens"]}
    all_of = tokens / timed / replicas  # a round before a prefill or a pause is not timed
    return Brought(tokens, all_of * seconds, all_of * plain, by_arm)
