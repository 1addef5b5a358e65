"""Arms that misbehave are left out, and their requests go on with others or plainly. Imports no SGLang.

What an arm drafts is only ever a proposal, so nothing it does can make a text wrong; it can only stop the server (an id
that no embedding has, an exception) or spoil what is learned from it (NaN). `lay_drafts` leaves out on the device what
cannot be a draft, and says so with the round's results; what is raised is caught where an arm is called.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("whiflash_sglang")

MOST_FAULTS = 4
"""Faulty drafts of an arm in a row, of whatever requests, after which it is out. Not one: what spoils a draft may lie
in one request's text, and arms are everybody's."""


class Quarantine:
    """Who is out until the server is started again.

    Every rank of those that serve a model together judges the same results, so all leave out the same arms. What one of
    them raises the others may not have: there it is not caught.

    Args:
        arms: all there are. alone: whether no other process serves the model with this one.

    Attributes:
        reasons: why, of every arm that is out. faults: of every arm, drafts that were none.
    """

    def __init__(self, arms: Iterable[str], *, alone: bool = True) -> None:
        self.faults = dict.fromkeys(arms, 0)
        self.reasons: dict[str, str] = {}
        self._in_a_row = dict.fromkeys(self.faults, 0)
        self._alone = alone

    def __contains__(self, arm: str) -> bool:
        return arm in self.reasons

    def judge(self, arm: str, *, faulty: bool) -> None:
        """`arm` drafted for a request: token ids of the target and numbers, or something else."""
        self._in_a_row[arm] = self._in_a_row[arm] + 1 if faulty else 0
        if not faulty:
            return
        self.faults[arm] += 1
        if self._in_a_row[arm] == MOST_FAULTS:
            self._leave_out(arm, f"{MOST_FAULTS} drafts in a row with ids of no token, or NaN")

    def raised(self, arm: str, error: Exception) -> None:
        """`arm` raised an error, which puts it out at once: what it keeps may be half written. Raises it again where
        this process is not alone.
        """
        if not self._alone:
            raise error
        self._leave_out(arm, f"raised {type(error).__name__}", error)

    @contextmanager
    def guard(self, arm: str) -> Iterator[None]:
        """What `arm` raises in here is `raised`."""
        try:
            yield
        except Exception as error:
            self.raised(arm, error)

    def _leave_out(self, arm: str, reason: str, error: Exception | None = None) -> None:
        if arm in self.reasons:
            return
        self.reasons[arm] = reason
        logger.error(
            "WHIFLASH: drafter %r is quarantined until the server is started again: %s. Requests go on without it.",
            arm,
            reason,
            exc_info=error,
        )
