"""Series on their way out of the worker: at intervals, since writing them takes longer than counting."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from whiflash_sglang.config import PolicyChange
from whiflash_sglang.drafters.base import Drafter
from whiflash_sglang.metrics.series import SERIES, Labels, Observed, Series
from whiflash_sglang.routing.assign import Costs

INTERVAL = 1.0
"""Seconds between two writings while rounds run; when the last request has ended what is left is written at once."""


class Sink(Protocol):
    """The receiver of series."""

    def write(self, series: Series, labels: Labels, number: float) -> None:
        """Add to a counter, set a gauge, or let a histogram observe."""
        ...


class Publisher:
    """Writes what has changed. Does nothing until it has a sink.

    Args:
        worker: whose figures. now: seconds that never run backwards.
    """

    def __init__(self, worker: Observed, now: Callable[[], float] = time.monotonic) -> None:
        self._worker, self._now = worker, now
        self._sink: Sink | None = None
        self._written: dict[tuple[str, Labels], float] = {}
        self._due = 0.0

    def start(self, sink: Sink) -> None:
        """Write to `sink` from now on; every series that has a value has one there at once."""
        self._sink = sink
        self.flush()

    def tick(self) -> None:
        """A step is done: write if it is time."""
        if self._sink is not None and self._now() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what has changed since the last time."""
        if self._sink is None:
            return
        for series in SERIES:
            for labels, number in series.read(self._worker):
                if series.kind == "histogram":
                    self._sink.write(series, labels, number)
                elif (before := self._written.get((series.name, labels))) != number:
                    self._written[series.name, labels] = number
                    self._sink.write(
                        series, labels, number - (before or 0.0) if series.kind == "counter" else number
                    )
        self._due = self._now() + INTERVAL


logger = logging.getLogger("whiflash_sglang")


def started(
    policy: str, drafters: Mapping[str, Drafter], costs: Costs, *, draft_bytes: int, token_bytes: int
) -> None:
    """Say who may draft, how wide, at what price.

    Args:
        draft_bytes: of a token's KV, the drafters' part. token_bytes: all of it.
    """
    arms = []
    for arm, drafter in drafters.items():
        seconds = costs.draft(arm, 1)
        price = f", {1000 * seconds:.2f} ms a draft" if seconds else ""
        arms.append(f"{arm} (up to {drafter.max_drafts} drafts{price})")
    share = draft_bytes / token_bytes if token_bytes else 0.0
    logger.info(
        "WHIFLASH: policy %s; arms %s; drafters' KV %d of %d bytes a token (%.1f%%)",
        policy,
        ", ".join(arms),
        draft_bytes,
        token_bytes,
        100 * share,
    )


def steered(client: str | None, call: str, what: Mapping[str, Any], status: int) -> None:
    """Say who changed what, or tried to, on a route that steers.

    Args:
        client: address of the connection, a gateway's if there is one before us; None where there is none. call: name
            of the route. what: as fields that are fit for a log: none of a tenant's keys. status: of the answer.
    """
    done = "done" if status == 200 else f"refused with {status}"
    logger.info("control: %s %s, from %s: %s", call, json.dumps(what), client or "nowhere", done)


def loggable(change: Mapping[str, Any]) -> dict[str, Any]:
    """A change of policy as the log may have it: the fields that exist, with what they were given if that is short."""
    found = {}
    for name in PolicyChange.model_fields:
        if name in change:
            value = change[name]
            short = isinstance(value, bool | int | float | str | None) and len(repr(value)) <= 32
            found[name] = value if short else "..."
    return found
