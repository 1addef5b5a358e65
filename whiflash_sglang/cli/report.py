"""The gain of drafting: of running servers by their counters, of agents and tenants by sampled traces."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from whiflash_sdk.report import Share
from whiflash_sdk.trace import Trace, routing

from whiflash_sglang.cli.top import less
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.disk import MOST_BYTES, open_regular
from whiflash_sglang.files.hosts import replicas_of
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, read_json

CAVEAT = (
    "Plain seconds are the server's prices of rounds without drafts for the same tokens, not a second run. Prefills "
    "and idle time are in neither. Figures of a tenant or an agent are in sampled traces (--traces) and in "
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


CALLERS = ("agent", "tenant")
NOBODY = "none named"
MOST = 1e9
"""Seconds, tokens or rounds of a request."""


class Callers(NamedTuple):
    """shares: by kind of caller, most tokens first; one request is in a row of each. skipped: lines and files that are
    not as a server writes them, each with the reason.
    """

    shares: dict[str, list[Share]]
    skipped: list[str]


def by_caller(directory: Path) -> Callers:
    """Sums of sampled traces by agent and by tenant. Raises ConfigError: there are none; OSError: it cannot be read."""
    traces: dict[str, dict[str, list[Trace]]] = {caller: {} for caller in CALLERS}
    skipped: list[str] = []
    for path in sorted(path for path in directory.iterdir() if path.match("traces*.jsonl")):
        try:
            with open_regular(path) as file:
                for number, line in enumerate(iter(partial(file.readline, MOST_BYTES), b""), 1):
                    try:
                        _add(line, traces)
                    except NOT_AS_WRITTEN as error:
                        if line.endswith(b"\n") or file.read(1):  # else its writer has not ended it
                            skipped.append(f"{path}, line {number}: {type(error).__name__}: {error}")
        except (OSError, ValueError) as error:
            skipped.append(f"{path}: {error}")
    if not any(traces.values()):
        why = f"; skipped {skipped[0]}" if skipped else ""
        raise ConfigError(
            f"{directory} has no sampled traces: start the server with --whiflash-trace-sample{why}"
        )
    shares = {
        caller: sorted((Share.of(*pair) for pair in named.items()), key=lambda share: -share.tokens)
        for caller, named in traces.items()
    }
    return Callers(shares, skipped)


def _add(line: bytes, traces: Mapping[str, dict[str, list[Trace]]]) -> None:
    """Put the trace of a sample's line, if it has one, beside others of its callers. Raises one of `NOT_AS_WRITTEN`."""
    sample = read_json(line) if line.strip() else {}
    trace = routing(sample)
    if trace is None:
        return
    check_figures(trace)
    names = {caller: sample.get(caller) or NOBODY for caller in traces}
    if not all(isinstance(name, str) for name in names.values()):
        raise TypeError("a caller's name is no text")
    for caller, name in names.items():
        traces[caller].setdefault(name, []).append(trace.model_copy(update={"stretches": ()}))


def check_figures(trace: Trace) -> None:
    """Raise ValueError where a trace's seconds or counts are those of no request."""
    held = [trace, *trace.stretches, *trace.arms.values(), *trace.sources.values()]
    figures = (value for holder in held for _, value in holder if isinstance(value, int | float))
    if any(abs(value) > MOST for value in figures):
        raise ValueError(f"a figure is above {MOST:.0e}, which no request comes to")


def gain_of(share: Share) -> float | None:
    """Estimated speed over plain decoding."""
    return None if not share.seconds or share.saved is None else 1 + share.saved / share.seconds
