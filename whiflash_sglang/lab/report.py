"""The gain of drafting: of running servers by their counters, of agents and tenants by sampled traces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sdk.report import Share
from whiflash_sdk.trace import routing

from whiflash_sglang.errors import ConfigError
from whiflash_sglang.jsonl import parse_json_lines
from whiflash_sglang.lab.top import less

CAVEAT = (
    "Plain seconds are the server's prices of rounds without drafts for the same tokens, not a second run. Prefills "
    "and idle time are in neither. Figures of a tenant or an agent are in sampled traces (--traces) and in "
    "`whiflash_sdk` (Session, collect)."
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


CALLERS = ("agent", "tenant")
NOBODY = "none named"


def by_caller(directory: Path) -> dict[str, list[Share]]:
    """Sums of sampled traces by agent and by tenant, most tokens first; one request is in a row of each.

    Raises:
        ConfigError: no file of samples is there, or a line of one is none.
    """
    files = sorted(directory.glob("traces*.jsonl"))
    samples = [
        sample
        for path in files
        for _, sample in parse_json_lines(path.read_text(encoding="utf-8"), path, may_be_torn=True)
    ]
    traced = [(sample, trace) for sample in samples if (trace := routing(sample)) is not None]
    if not traced:
        raise ConfigError(f"{directory} has no sampled traces: start the server with --whiflash-trace-sample")
    found = {}
    for caller in CALLERS:
        by_name: dict[str, list[Any]] = {}
        for sample, trace in traced:
            by_name.setdefault(sample.get(caller) or NOBODY, []).append(trace)
        shares = [Share.of(name, traces) for name, traces in by_name.items()]
        found[caller] = sorted(shares, key=lambda share: -share.tokens)
    return found


def gain_of(share: Share) -> float | None:
    """Estimated speed over plain decoding."""
    return None if not share.seconds or share.saved is None else 1 + share.saved / share.seconds
