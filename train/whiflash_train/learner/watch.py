"""Pass after pass beside a server, as its samples come, with an eye on what the server was switched to."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.files.disk import open_own
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN
from whiflash_sglang.updates.samples import files_of, samples_of
from whiflash_train.learner.guard import Drop, Guard
from whiflash_train.learner.once import (
    Learning,
    Outcome,
    Pace,
    is_at_work,
    is_past,
    learn_once,
    status_of,
    until,
    write_status,
)
from whiflash_train.learner.texts import LEAST, TooFewError

POLL = 15.0
"""Seconds between two looks at the samples, and at the server."""

T = TypeVar("T")
Say = Callable[[dict[str, Any]], object]


class Watch:
    """Learns whenever there are enough new samples.

    Args:
        guard: of the server that versions are offered to; None: they are only published. say: takes what happens, as
            JSON. share: as of `Pace`. now, sleep: a clock in seconds, and what waits.
    """

    def __init__(
        self,
        learning: Learning,
        guard: Guard | None,
        say: Say,
        share: float | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._learning, self._guard, self._say = learning, guard, say
        self._now, self._sleep = now, sleep
        self._looked = -POLL
        self._silent = False
        self._pace = Pace(share, between=self.look)

    def run(self) -> NoReturn:
        """Until the process ends."""
        while True:
            self.look()
            if self.step() is None:
                self._sleep(POLL)

    def step(self) -> Outcome | None:
        """A pass over the samples, if enough came since the last one's."""
        if new_samples(self._learning.directory) < 2 * LEAST:
            return None
        try:
            outcome = learn_once(self._learning, self._pace)
        except TooFewError:  # most of them cannot be learned from
            return None
        self._say(outcome.model_dump())
        self._offer(outcome)
        return outcome

    def look(self) -> None:
        """Look at the server, at most every `POLL` seconds: a version that accepts less than before is left."""
        if self._guard is None or self._now() - self._looked < POLL:
            return
        self._looked = self._now()
        drop = self._asked(self._guard.look)
        if drop is not None:
            self._asked(lambda: self._roll_back(drop))

    def _roll_back(self, drop: Drop) -> None:
        fact = {
            "rolled_back": drop.version,
            "serves": drop.now,
            "accepted": {name: change.model_dump() for name, change in drop.changes.items()},
        }
        self._say(fact)
        write_status(self._learning.directory, {**status_of(self._learning.directory), **fact})

    def _offer(self, outcome: Outcome) -> None:
        """Have the server use the version, if there is one and it still uses what that was compared with."""
        guard, number = self._guard, outcome.version
        if guard is None or number is None:
            return
        self.look()
        serves = self._asked(guard.serves)
        if serves is None:
            return
        if serves != outcome.present:
            why = f"the server was switched from {outcome.present} to {serves} meanwhile"
            self._say({"not_offered": number, "why": f"{why}; whiflash drafter {number} switches to it"})
            return
        self._asked(lambda: guard.switch(number))

    def _asked(self, ask: Callable[[], T]) -> T | None:
        """Answer of the server; None if it cannot be used, which is reported: a pass under way goes on."""
        try:
            answer = ask()
        except NOT_AS_WRITTEN as error:
            if not self._silent:
                why = str(error) if isinstance(error, OSError | WhiflashError) else repr(error)
                self._say({"server": why})
            self._silent = True
            return None
        self._silent = False
        return answer


def new_samples(directory: Path) -> int:
    """Samples that were written after those of the last pass. Nobody has looked whether they can be learned from."""
    since = until(status_of(directory))
    count = 0
    for file in files_of(samples_of(directory)):
        if file.written > since and is_past(file.written):
            try:
                with open_own(file.path) as samples:
                    count += max(sum(1 for _ in samples) - 1, 0)  # the first line is no sample
            except (ConfigError, OSError):  # others wrote it, or it was dropped meanwhile
                continue
    return count


def progress_of(directory: Path) -> dict[str, Any]:
    """The last pass, whether one is under way, and how many samples wait for the next one. Raises OSError."""
    with suppress(FileNotFoundError):
        os.listdir(samples_of(directory))  # `files_of` finds none in a directory that it may not read
    return {**status_of(directory), "learning": is_at_work(directory), "new_samples": new_samples(directory)}
