"""Leaves out arms that misbehave; their requests go on with other arms or decode plainly. Imports no SGLang.

The target verifies every draft, so an arm cannot make a text wrong. It can only stop the server (an invalid token id,
an exception) or spoil what is learned from it (NaN). `lay_drafts` drops invalid drafts on the device and reports them
with the round's results; exceptions are caught at each call of an arm.

Mostly the text of one request makes an arm raise, so the arm is left out for that request. It is quarantined (left out
for every request) if it raised for several requests of several callers, or for many of one caller, and served none well
in between. It is also quarantined if it raised for a batch and then for no single request of it.
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
"""Consecutive faulty drafts of an arm for one request, after which it is left out for that request."""
SEVERAL_REQUESTS, SEVERAL_CALLERS = 3, 2
"""Consecutive requests, and different callers among them, for which an arm is left out before it is quarantined."""
MANY_REQUESTS = 16
"""Consecutive requests, of any caller, that quarantine an arm: all requests without a salt count as one caller's."""
FIRST_SECONDS, LONGEST_SECONDS = 60.0, 3600.0
"""Seconds of an arm's first quarantine and of the longest; each one is twice as long as the one before it."""

ResultT = TypeVar("ResultT")


class Quarantine:
    """Judges arms by their faults and leaves them out, for one request or for all.

    Ranks that serve one model together (tensor parallelism) judge the same results, so all leave out the same arms.
    Their clocks differ, so with several ranks no quarantine ends. A model may raise in one rank only, so then its error
    is not caught. Arms that draft from text raise in every rank or in none, or only the first rank asks them.

    Args:
        arms: names of all arms. alone: whether this process serves the model without other ranks. from_text: arms that
            draft from a request's text and run no model. clock: returns seconds.

    Attributes:
        reasons: by quarantined arm, why. faults: by arm, its number of invalid drafts. left_out: by arm, the number of
            requests that it was left out for.
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
        self._times = dict.fromkeys(self.faults, 0)  # how often each arm was quarantined
        self._streaks: dict[str, list[object]] = {arm: [] for arm in self.faults}
        """By arm, callers of the consecutive requests for which it was left out."""
        self._seconds = dict.fromkeys(self.faults, FIRST_SECONDS)
        self._until: dict[str, float] = {}
        self._without_kv: set[str] = set()

    def __contains__(self, arm: str) -> bool:
        return arm in self.reasons

    def serving(self, arms: Collection[str], request: Request) -> Collection[str]:
        """Return the arms of `arms` that may draft for a request."""
        if not self.reasons and not request.left_out:
            return arms
        return [arm for arm in arms if self.serves(arm, request)]

    def serves(self, arm: str, request: Request) -> bool:
        """Whether `arm` may draft for a request: it is neither quarantined nor left out for the request."""
        return arm not in self.reasons and arm not in request.left_out

    def ingests(self, arm: str) -> bool:
        """Whether `arm` ingests features: its KV has no holes. A quarantined arm goes on ingesting, to serve later."""
        return arm not in self._without_kv

    def begin(self, request: Request) -> None:
        """Begin a request. It never gets the arms that are quarantined now: they have not seen its prompt."""
        request.left_out.update(self.reasons)

    def end(self, request: Request) -> None:
        """End a request. An arm that served it well until then has its streak and its quarantine time reset."""
        for arm, times in request.sound.items():
            if self.serves(arm, request) and times == self._times[arm]:
                self._streaks[arm].clear()
                self._seconds[arm] = FIRST_SECONDS

    def tick(self) -> None:
        """Begin a round: release the arms whose quarantine is over, also for requests that begin from now on."""
        for arm in [arm for arm, until in self._until.items() if self._clock() >= until]:
            del self._until[arm], self.reasons[arm]
            logger.warning("WHIFLASH: the quarantine of drafter %r is over; it is asked again.", arm)

    def judge(self, arm: str, request: Request, *, faulty: bool) -> None:
        """Count a draft of `arm` for a request. faulty: it had invalid token ids or NaN."""
        self.faults[arm] += faulty
        if not request.running:
            return
        if not faulty:
            # An arm that was left out after the round was planned has drafted nothing in it.
            if self.serves(arm, request):
                request.sound[arm] = self._times[arm]
            request.in_a_row.pop(arm, None)
            return
        request.in_a_row[arm] = request.in_a_row.get(arm, 0) + 1
        if request.in_a_row[arm] == MOST_FAULTS:
            self._leave_out(arm, request, f"{MOST_FAULTS} drafts in a row with ids of no token, or NaN")

    def raised(self, arm: str, error: Exception, request: Request | None = None) -> None:
        """Leave `arm` out for the request that it raised for, or quarantine it if `request` is None.

        Raises the error again if the machine caused it (memory, device), or if other ranks may not see it.
        """
        self._reraise(arm, error, request)
        if request is None:
            self._quarantine(arm, _describe(error), error)
        else:
            self._leave_out(arm, request, _describe(error), error)

    @contextmanager
    def guard(self, arm: str, request: Request | None = None) -> Iterator[None]:
        """Pass an exception that `arm` raises in the `with` block to `raised`."""
        try:
            yield
        except Exception as error:
            self.raised(arm, error, request)

    @contextmanager
    def guard_ingestion(self, arm: str) -> Iterator[None]:
        """Quarantine `arm` until a restart if it raises in the `with` block: its KV then has holes, in shared slots."""
        try:
            yield
        except Exception as error:
            self._reraise(arm, error)
            self._without_kv.add(arm)
            self._quarantine(arm, f"{_describe(error)} while it ingested", error)

    def attempt(
        self, arm: str, requests: Mapping[int, Request], call: Callable[[Sequence[int]], ResultT]
    ) -> tuple[Sequence[int], ResultT | None]:
        """Call `call` with all indices of `requests`. If it raises, try each index alone, then call it with those that
        did not raise. Return the indices and the result of that call; () and None if it failed for all.
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
        if len(sound) == len(members):  # no request explains it, so every round may raise
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
        # Calls without a request are made on the first rank only, so other ranks would not see their errors.
        alike = self._alone or (request is not None and arm in self._from_text)
        if not alike or _is_the_machines(error):
            raise error

    def _leave_out(self, arm: str, request: Request, reason: str, error: Exception | None = None) -> None:
        if not request.running or arm in request.left_out:
            return
        request.left_out.add(arm)
        if arm in self.reasons:
            return  # already quarantined: this is the result of a round still running, or the rest of a batch
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
        streak.append(request.tenant)
        several = len(streak) >= SEVERAL_REQUESTS and len(set(streak)) >= SEVERAL_CALLERS
        if several or len(streak) >= MANY_REQUESTS:
            self._quarantine(arm, f"{reason}, for {len(streak)} requests in a row", error)

    def _quarantine(self, arm: str, reason: str, error: Exception | None) -> None:
        ends = self._alone and arm not in self._without_kv
        if arm in self.reasons and (ends or arm not in self._until):
            return  # the quarantine that it has lasts as long
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
"""Substrings of device and memory errors that torch and Triton raise as plain RuntimeErrors."""


def _is_the_machines(error: Exception) -> bool:
    """Whether memory or a device failed: every later call would fail too, so the scheduler has to see the error."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _MACHINES)
