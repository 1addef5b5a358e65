"""Whether drafters that a server was switched to accept less of its traffic than those before: they are switched back.

The server's sums over requests that ended (`lengths` of its state) are read before the switch and afterwards. Requests
that ran across the switch count as later ones.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from whiflash_sglang.checkpoints.manifest import PARTS
from whiflash_sglang.files.jsonl import read_json_file, write_whole
from whiflash_sglang.telemetry.lengths import Lengths
from whiflash_train.statistics import Interval

LEAST, MOST = 32, 1024
"""Requests of a drafter on either side of a switch: with fewer nothing is known; after more it has served well."""

FILE = "guard.json"

ByArm = dict[str, Lengths]


class VersionedServer(Protocol):
    """A running server with versions. Both return its state."""

    def state(self) -> dict[str, Any]: ...

    def use(self, version: int) -> dict[str, Any]: ...


class Watched(BaseModel, frozen=True):
    """version: that serves. since: the sums when it began. earlier: of the version before it, by arm."""

    version: int
    since: ByArm
    earlier: ByArm


QUANTILE = 2.576
"""Quantile of a 99 % interval: looked at again and again, one of 95 % would be left too often by chance."""


def change(before: Lengths, after: Lengths) -> Interval:
    """A length divided by an earlier one, of two periods with at least two requests each."""
    ratio = after.length / before.length
    margin = math.exp(QUANTILE * math.sqrt(before.variance + after.variance))
    return Interval(ratio=ratio, low=ratio / margin, high=ratio * margin)


class Drop(NamedTuple):
    """A rollback. version: the one that was left. now: the one that serves again. changes: by drafter."""

    version: int
    now: int
    changes: dict[str, Interval]


class Guard:
    """Guard of one server. Its state is kept in the learner's directory, so that a killed learner goes on."""

    def __init__(self, server: VersionedServer, directory: Path) -> None:
        self._server, self._file = server, directory / FILE
        self._watched = _read(self._file)

    def serves(self) -> int:
        """The version that the server uses."""
        return int(self._server.state()["drafters"]["version"])

    def switch(self, version: int) -> None:
        """Have the server use a version, and watch it."""
        self.look()
        before = self._server.state()
        earlier = self._between(before)
        after = self._server.use(version)
        self._watch(Watched(version=version, since=_lengths(after), earlier=earlier))

    def look(self) -> Drop | None:
        """Roll back if a drafter accepts less than before the switch, beyond its 99 % interval."""
        state = self._server.state()
        serves = int(state["drafters"]["version"])
        if self._watched is None or self._watched.version != serves:
            # Somebody else has switched: they know why.
            self._watch(Watched(version=serves, since=_lengths(state), earlier={}))
            return None
        later = self._between(state)
        changes = {
            arm: change(earlier, later[arm])
            for arm, earlier in self._watched.earlier.items()
            if arm in later and earlier.requests >= LEAST and LEAST <= later[arm].requests <= MOST
        }
        if not any(change_of_arm.high < 1 for change_of_arm in changes.values()):
            return None
        back = self._server.use(int(state["drafters"]["before"]))
        now = int(back["drafters"]["version"])
        self._watch(Watched(version=now, since=_lengths(back), earlier={}))
        return Drop(serves, now, {PARTS[arm]: change_of_arm for arm, change_of_arm in changes.items()})

    def _between(self, state: Mapping[str, Any]) -> ByArm:
        """The requests that ended since what serves began to."""
        assert self._watched is not None
        now = _lengths(state)
        try:
            return {arm: now[arm].since(since) for arm, since in self._watched.since.items() if arm in now}
        except ValueError:  # the server was started again: what serves begins now
            self._watch(self._watched.model_copy(update={"since": {arm: Lengths() for arm in now}}))
            return now

    def _watch(self, watched: Watched) -> None:
        self._watched = watched
        write_whole(self._file, watched.model_dump_json())


def _lengths(state: Mapping[str, Any]) -> ByArm:
    """Lengths of the drafters that have versions; a newer server may have further sums."""
    known = Lengths.__slots__
    lengths = state["lengths"].items()
    return {arm: Lengths(*(sums[name] for name in known)) for arm, sums in lengths if arm in PARTS}


def _read(file: Path) -> Watched | None:
    """State of an earlier learner; None if it cannot be read."""
    try:
        return Watched.model_validate(read_json_file(file))
    except (OSError, ValueError):
        return None
