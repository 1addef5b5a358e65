"""Leaves out arms that misbehave; their requests go on with other arms or decode plainly. Imports no SGLang.

The target verifies every draft, so an arm cannot make a text wrong. It can only stop the server (an invalid token id,
an exception) or spoil what is learned from it (NaN). `lay_drafts` drops invalid drafts on the device and reports them
with the round's results; exceptions are caught at each call of an arm.

Mostly the text of one request makes an arm raise, so the arm is left out for that request. It is quarantined (left out
for every request until the server is started again) if that happened for many requests in a row. These cannot all be
one tenant's, so none takes an arm from the others. It is also quarantined if it raised while it worked for a batch and
then for no single request of it.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from whiflash_sglang.copying.tenants import Tenant
from whiflash_sglang.records.request import Request

logger = logging.getLogger("whiflash_sglang")

MOST_FAULTS = 4
"""Consecutive faulty drafts of an arm for one request, after which it is left out for that request."""
MOST_REQUESTS = 16
"""Consecutive requests for which an arm is left out before it is quarantined. One tenant's count as half at most."""

ResultT = TypeVar("ResultT")


class Quarantine:
    """Judges arms by their faults and leaves them out, for one request or for all.

    Ranks that serve one model together (tensor parallelism) judge the same results, so all leave out the same arms. A
    model may raise in one rank only, so with several ranks its error is not caught. Arms that draft from text raise in
    every rank or in none, or only the first rank asks them.

    Args:
        arms: names of all arms. alone: whether this process serves the model without other ranks. from_text: arms that
            draft from a request's text and run no model.

    Attributes:
        reasons: by quarantined arm, why. faults: by arm, its number of invalid drafts. left_out: by arm, the number of
            requests that it was left out for.
    """

    def __init__(self, arms: Iterable[str], *, alone: bool = True, from_text: Iterable[str] = ()) -> None:
        self.faults = dict.fromkeys(arms, 0)
        self.left_out = dict.fromkeys(self.faults, 0)
        self.reasons: dict[str, str] = {}
        self._alone, self._from_text = alone, frozenset(from_text)
        self._failed: dict[str, list[Tenant | None]] = {arm: [] for arm in self.faults}
        """By arm, tenants of the consecutive requests for which it was left out."""

    def __contains__(self, arm: str) -> bool:
        """Whether `arm` is quarantined: it neither drafts nor ingests, so its KV has holes from then on."""
        return arm in self.reasons

    def serving(self, arms: Collection[str], request: Request) -> Collection[str]:
        """Return the arms of `arms` that may draft for a request."""
        if not self.reasons and not request.left_out:
            return arms
        return [arm for arm in arms if self.serves(arm, request)]

    def serves(self, arm: str, request: Request) -> bool:
        """Whether `arm` may draft for a request: it is neither quarantined nor left out for the request."""
        return arm not in self.reasons and arm not in request.left_out

    def end(self, request: Request) -> None:
        """End a request. If an arm's last draft for it was valid, the arm's count of failed requests is set to 0."""
        for arm, faults in request.faults.items():
            if not faults and self.serves(arm, request):
                self._failed[arm].clear()

    def judge(self, arm: str, request: Request, *, faulty: bool) -> None:
        """Count a draft of `arm` for a request. faulty: it had invalid token ids or NaN."""
        if not faulty and request.faults.get(arm) == 0:
            return  # it was valid before, too
        self.faults[arm] += faulty
        # An arm that was left out after the round was planned has drafted nothing in it.
        if request.running and self.serves(arm, request):
            request.faults[arm] = request.faults.get(arm, 0) + 1 if faulty else 0
            if request.faults[arm] == MOST_FAULTS:
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
        """Quarantine `arm` if it raises in the `with` block: its KV then has holes, in shared slots."""
        try:
            yield
        except Exception as error:
            self._reraise(arm, error)
            self._quarantine(arm, f"{_describe(error)} while it ingested", error)

    def attempt(
        self, arm: str, requests: Mapping[int, Request], call: Callable[[Sequence[int]], ResultT]
    ) -> tuple[Sequence[int], ResultT | None]:
        """Call `call` with all indices of `requests`, and return the indices and its result.

        If it raises, return () and None. The arm is then left out for each request for which it raises alone too, so
        the next round goes on with the others.
        """
        members = list(requests)
        try:
            return members, call(members)
        except Exception as error:
            if len(members) == 1:
                self.raised(arm, error, requests[members[0]])
                return (), None
            self._reraise(arm, error, requests[members[0]])
            raised = error
        for index in members:
            if arm not in self.reasons:
                with self.guard(arm, requests[index]):
                    call([index])
        if all(self.serves(arm, request) for request in requests.values()):  # so every round may raise
            self._quarantine(arm, f"{_describe(raised)} for a batch and for no request of it", raised)
        return (), None

    def _reraise(self, arm: str, error: Exception, request: Request | None = None) -> None:
        # Calls without a request are made on the first rank only, so other ranks would not see their errors.
        alike = self._alone or (request is not None and arm in self._from_text)
        if not alike or _is_the_machines(error):
            raise error

    def _leave_out(self, arm: str, request: Request, reason: str, error: Exception | None = None) -> None:
        if not request.running or not self.serves(arm, request):
            return  # the result of a round that was under way, or the rest of a batch
        request.left_out.add(arm)
        self.left_out[arm] += 1
        logger.warning(
            "WHIFLASH: drafter %r is left out for request %.64r: %s. The request goes on without it.",
            arm,
            request.rid,
            reason,
            exc_info=error if self.left_out[arm] == 1 else None,
        )
        failed, tenant = self._failed[arm], request.tenant
        if tenant is None or failed.count(tenant) < MOST_REQUESTS // 2:  # those without a key may be anybody's
            failed.append(tenant)
        if len(failed) == MOST_REQUESTS:
            self._quarantine(arm, f"{reason}, for {MOST_REQUESTS} requests in a row", error)

    def _quarantine(self, arm: str, reason: str, error: Exception | None) -> None:
        if arm not in self.reasons:
            self.reasons[arm] = reason
            logger.error(
                "WHIFLASH: drafter %r is quarantined until the server is started again: %s. Requests go on without it.",
                arm,
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
