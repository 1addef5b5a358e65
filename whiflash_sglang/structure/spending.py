"""Measures the seconds that rounds spend on grammars, and finds requests whose grammar is too dear for drafts.

A token's work in a grammar has no bound: a hundred nested repeats take xgrammar a tenth of a second, and each further
token takes longer. Plain decoding pays it twice a token, for the mask and for the token itself. A draft pays it again
when it is looked for, when it is extended, and when its mask is made.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

REQUEST_SECONDS = 0.05
"""Seconds of a round from which on a request takes no drafts in the next rounds."""

ROUND_SECONDS = 0.25
"""Seconds that all requests of a round may spend together, beside the step each is in when its share is used up."""

LOOKING = 0.5
"""Part of a request's seconds for questions, by which drafts are found; the rest is for their masks."""

QUESTION_SECONDS = 1e-3
"""Seconds for questions a request of the round, after which none begins in it. An answer takes some 0.4 ms, and is then
known for all requests of a tenant with the same tools."""

FIRST_PAUSE, LONGEST_PAUSE = 16, 1024
"""Rounds without drafts: in the first pause, and at most. Each pause is twice as long as the one before it."""

ResultT = TypeVar("ResultT")


class _Request:
    """A request's time. spent: seconds in this round. pause: rounds of its last pause; left: those still to come."""

    spent, pause, left = 0.0, 0, 0


class Spending:
    """Measures the time that each request of a process spends on its grammar.

    Args:
        clock: processor seconds of this thread, so that no request pays for other processes. wall: wall-clock seconds,
            never fewer and cheaper to read. cuts: whether work ends early when a share is used up; not with several
            ranks, which must do the same work, and whose clocks differ.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.thread_time,
        wall: Callable[[], float] = time.perf_counter,
        *,
        cuts: bool = True,
    ) -> None:
        self._clock, self._wall, self._cuts = clock, wall, cuts
        self._requests: dict[str, _Request] = {}
        self._current: _Request | None = None
        self._began = self._least_end = self._limit = 0.0
        self._share, self._questions = REQUEST_SECONDS, ROUND_SECONDS
        self.late: str | None = None
        """The first request that had a question when no time was left for it: the next round begins with it."""
        self._waiting: str | None = None

    def begin(self, rids: Sequence[str]) -> None:
        """Begin a round of these requests, and set pauses by the round before it. Other requests are forgotten."""
        self._requests = {rid: self._requests[rid] for rid in rids if rid in self._requests}
        for request in self._requests.values():
            if request.spent >= REQUEST_SECONDS:
                if not request.left:
                    request.pause = min(2 * request.pause, LONGEST_PAUSE) or FIRST_PAUSE
                request.left = request.pause
            elif request.left:
                request.left -= 1
            else:
                request.pause = 0
            request.spent = 0.0
        self._share = min(REQUEST_SECONDS, ROUND_SECONDS / max(len(self._requests), 1))
        self._questions, self.late, self._waiting = QUESTION_SECONDS * len(rids), self._waiting, None

    def is_dear(self, rid: str) -> bool:
        """Whether a request takes no drafts in this round, since its grammar took too much time."""
        request = self._requests.get(rid)
        return request is not None and request.left > 0

    def on(self, rid: str, work: Callable[[], ResultT]) -> ResultT:
        """Run `work`, counting its seconds for the request; `exhausted` in it means that its share is used up."""
        return self._run(rid, work, self._share)

    def ask(self, rid: str, question: Callable[[], object]) -> None:
        """Run a question for a request, unless the round has no time left for questions."""
        if self._questions <= 0.0:
            self._waiting = self._waiting or rid
            return
        began = self._clock()  # not wall time: other processes would take this round's questions
        try:
            self._run(rid, question, LOOKING * REQUEST_SECONDS)
        finally:
            self._questions -= self._clock() - began

    def _run(self, rid: str, work: Callable[[], ResultT], limit: float) -> ResultT:
        request = self._current = self._requests.setdefault(rid, _Request())
        self._began, self._limit = self._clock(), limit
        self._least_end = self._wall() + limit - request.spent
        try:
            return work()
        finally:
            request.spent += self._clock() - self._began
            self._current = None

    def exhausted(self) -> bool:
        """Whether the running work should end, since its request's share of the round is used up."""
        request = self._current
        if not self._cuts or request is None or self._wall() < self._least_end:
            return False
        return request.spent + self._clock() - self._began >= self._limit
