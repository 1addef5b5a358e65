"""Arms that misbehave are left out, and their requests go on with others or plainly. Imports no SGLang.

Drafts are only ever a proposal, so nothing an arm does can make a text wrong. It can only stop the server (an id that
no embedding has, an exception) or spoil what is learned from it (NaN). `lay_drafts` leaves out on the device what
cannot be a draft, and says so with the round's results; what is raised is caught where an arm is called.

An arm is everybody's, and what makes it raise is mostly one request's text. So an arm that raises for a request is left
out for that request. It is quarantined, left out for everybody, if it raised for several requests of several callers,
or for many of one, and served none well in between. So is one that raised for a batch and then for no request of it.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from whiflash_sglang.records.request import Request

logger = logging.getLogger("whiflash_sglang")

MOST_FAULTS = 4
"""Faulty drafts in a row of an arm for one request, after which it is left out for that request."""
SEVERAL_REQUESTS, SEVERAL_CALLERS = 3, 2
"""Requests in a row, and callers among them, for which an arm is left out before it is quarantined."""
MANY_REQUESTS = 16
"""The same, whoever sent them: requests without a salt are one caller's, as nobody knows who sent them."""
FIRST_SECONDS, LONGEST_SECONDS = 60.0, 3600.0
"""Durations of a quarantine: the first, and the longest. Each is twice as long as the one before it."""

ResultT = TypeVar("ResultT")


class Quarantine:
    """Arms that are left out, for one request or for everybody.

    Every rank of those that serve a model together judges the same results, so all leave out the same arms. Clocks of
    ranks do not agree, so there no quarantine ends. A model's error in one rank may be missing in others: it is not
    caught. Arms that draft from text raise in every rank or in none, or only the first asks them and plans by it.

    Args:
        arms: all there are. alone: whether no other process serves the model with this one. from_text: arms that draft
            from a request's text and run no model. clock: seconds.

    Attributes:
        reasons: why, of every arm that is quarantined. faults: of every arm, drafts that were none. left_out: of every
            arm, requests that went on without it.
    """

    def __init__(
        self,
        arms: Iterable[str],
        *,
        alone: bool = True,
        from_text: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.faults = dict.fromkeys(arms, 0)
        self.left_out = dict.fromkeys(self.faults, 0)
        self.reasons: dict[str, str] = {}
        self._alone, self._from_text, self._clock = alone, frozenset(from_text), clock
        self._times = dict.fromkeys(self.faults, 0)  # that an arm was quarantined
        self._streaks: dict[str, list[object]] = {arm: [] for arm in self.faults}
        """Callers of requests in a row for which an arm was left out."""
        self._seconds = dict.fromkeys(self.faults, FIRST_SECONDS)
        self._until: dict[str, float] = {}
        self._without_kv: set[str] = set()

    def __contains__(self, arm: str) -> bool:
        return arm in self.reasons

    def serving(self, arms: Collection[str], request: Request) -> Collection[str]:
        """Arms of `arms` that may be asked for a request."""
        if not self.reasons and not request.left_out:
            return arms
        return [arm for arm in arms if self.serves(arm, request)]

    def serves(self, arm: str, request: Request) -> bool:
        """Whether `arm` may be asked for a request."""
        return arm not in self.reasons and arm not in request.left_out

    def ingests(self, arm: str) -> bool:
        """Whether the KV of `arm` is whole. It is kept so while the arm is quarantined, for the time after."""
        return arm not in self._without_kv

    def begin(self, request: Request) -> None:
        """A request begins. Arms that are quarantined now know nothing of it, so they stay out for it."""
        request.left_out.update(self.reasons)

    def end(self, request: Request) -> None:
        """A request ends. An arm that served it well owes its earlier faults to other requests."""
        for arm, times in request.sound.items():
            if self.serves(arm, request) and times == self._times[arm]:
                self._streaks[arm].clear()
                self._seconds[arm] = FIRST_SECONDS

    def tick(self) -> None:
        """A round begins: arms whose time is over are asked again, for the requests that begin from now on too."""
        for arm in [arm for arm, until in self._until.items() if self._clock() >= until]:
            del self._until[arm], self.reasons[arm]
            logger.warning("WHIFLASH: the quarantine of drafter %r is over; it is asked again.", arm)

    def judge(self, arm: str, request: Request, *, faulty: bool) -> None:
        """`arm` drafted for a request: token ids of the target and numbers, or something else."""
        self.faults[arm] += faulty
        if not request.running:
            return
        if not faulty:
            # Else it was left out behind the plan of the round, and drafted nothing.
            if self.serves(arm, request):
                request.sound[arm] = self._times[arm]
            request.in_a_row.pop(arm, None)
            return
        request.in_a_row[arm] = request.in_a_row.get(arm, 0) + 1
        if request.in_a_row[arm] == MOST_FAULTS:
            self._leave_out(arm, request, f"{MOST_FAULTS} drafts in a row with ids of no token, or NaN")

    def raised(self, arm: str, error: Exception, request: Request | None = None) -> None:
        """`arm` raised an error for a request; None: for whatever it is asked.

        Raises it again if it is the machine's and no arm's, or if other ranks may not have it.
        """
        self._reraise(arm, error, request)
        if request is None:
            self._quarantine(arm, _describe(error), error)
        else:
            self._leave_out(arm, request, _describe(error), error)

    @contextmanager
    def guard(self, arm: str, request: Request | None = None) -> Iterator[None]:
        """Handle an exception that `arm` raises in here as `raised` does."""
        try:
            yield
        except Exception as error:
            self.raised(arm, error, request)

    @contextmanager
    def guard_ingestion(self, arm: str) -> Iterator[None]:
        """Quarantine `arm` for good if it raises in here: holes are left in its KV that later requests may share."""
        try:
            yield
        except Exception as error:
            self._reraise(arm, error)
            self._without_kv.add(arm)
            self._quarantine(arm, f"{_describe(error)} while it ingested", error)

    def attempt(
        self, arm: str, requests: Mapping[int, Request], call: Callable[[Sequence[int]], ResultT]
    ) -> tuple[Sequence[int], ResultT | None]:
        """Results of `call` for indices of `requests`, and these: all of them, or if that raises, those that do not
        raise when called for separately. None: it returns nothing for any of them.
        """
        members = list(requests)
        try:
            return members, call(members)
        except Exception as error:
            first = requests[members[0]]
            if len(members) == 1:
                self.raised(arm, error, first)
                return (), None
            self._reraise(arm, error, first)
            raised = error
        sound = [i for i in members if arm not in self.reasons and self._succeeds(arm, requests[i], call, i)]
        if len(sound) == len(members):  # no request to leave out, and it may raise every round
            self._quarantine(arm, f"{_describe(raised)} for a batch and for no request of it", raised)
        if not sound or arm in self.reasons:
            return (), None
        with self.guard(arm):
            return sound, call(sound)
        return (), None

    def _succeeds(
        self, arm: str, request: Request, call: Callable[[Sequence[int]], object], index: int
    ) -> bool:
        try:
            call([index])
        except Exception as error:
            self.raised(arm, error, request)
            return False
        return True

    def _reraise(self, arm: str, error: Exception, request: Request | None = None) -> None:
        # The first rank alone asks what is nobody's request.
        alike = self._alone or (request is not None and arm in self._from_text)
        if not alike or _is_the_machines(error):
            raise error

    def _leave_out(self, arm: str, request: Request, reason: str, error: Exception | None = None) -> None:
        if not request.running or arm in request.left_out:
            return
        request.left_out.add(arm)
        if arm in self.reasons:
            return  # that it fails is known: a result of a round that was under way, or the rest of a batch
        first = not self.left_out[arm]
        self.left_out[arm] += 1
        logger.warning(
            "WHIFLASH: drafter %r is left out for request %.64r: %s. The request goes on without it.",
            arm,
            request.rid,
            reason,
            exc_info=error if first else None,
        )
        streak = self._streaks[arm]
        streak.append(request.caller)
        several = len(streak) >= SEVERAL_REQUESTS and len(set(streak)) >= SEVERAL_CALLERS
        if several or len(streak) >= MANY_REQUESTS:
            self._quarantine(arm, f"{reason}, for {len(streak)} requests in a row", error)

    def _quarantine(self, arm: str, reason: str, error: Exception | None) -> None:
        ends = self._alone and arm not in self._without_kv
        if arm in self.reasons and (ends or arm not in self._until):
            return  # it is out for as long already
        self.reasons[arm] = reason
        self._until.pop(arm, None)
        self._streaks[arm].clear()
        self._times[arm] += 1
        seconds = self._seconds[arm]
        if ends:
            self._until[arm] = self._clock() + seconds
            self._seconds[arm] = min(2 * seconds, LONGEST_SECONDS)
        logger.error(
            "WHIFLASH: drafter %r is quarantined %s: %s. Requests go on without it.",
            arm,
            f"for {seconds:.0f} s" if ends else "until the server is started again",
            reason,
            exc_info=error,
        )


def _describe(error: Exception) -> str:
    return f"raised {type(error).__name__}"


_MACHINES = (
    "CUDA error",
    "cuda runtime error",
    "Triton Error [CUDA]",
    "cuDNN error",
    "NCCL error",
    "HIP error",
    "DefaultCPUAllocator",
    "bad allocation",
)
"""Parts of the messages of errors that torch and Triton raise as plain RuntimeErrors."""


def _is_the_machines(error: Exception) -> bool:
    """Whether memory or a device failed: every later call would fail too, and the scheduler has to know."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _MACHINES)
