"""A drafter that misbehaves is left out and named, for one request or for all; no text changes."""

import logging
import random
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import MagicMock

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from reference import Comparison
from test_published import Recorded

from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.records.core import Limits, Results
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.round.quarantine import MOST_FAULTS, MOST_REQUESTS, Quarantine

PROMPTS = [random.Random(i).choices(range(256), k=12 + 5 * i) * 2 for i in range(4)]
TOKENS = 40
SOUND = 3
"""Calls of the spoiled method that are as they were."""


def fails(*_: Any) -> NoReturn:
    raise RuntimeError("planted")


def rounds_of(e: Engine) -> dict[str, int]:
    counted = e.worker.tally.by_arm.items()
    return {arm: counts.rounds for arm, counts in counted if arm != "structure"}


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    with engine(models.target) as e:
        return e.generate(PROMPTS, max_new_tokens=TOKENS)


@pytest.mark.parametrize(
    ("arm", "method"), [("ar", "draft"), ("diffusion", "catch_up")], ids=["ids of no token", "an exception"]
)
def test_requests_go_on_without_it(
    models: Models,
    plain: list[list[int]],
    arm: str,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Other drafts that cannot be any: `kernels/tests/test_drafts.py`, `test_candidates.py`."""
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        published = Recorded()
        e.worker.publisher.start(published.write)
        original, calls = getattr(e.worker.drafters[arm], method), count()

        def spoiled(*args: Any) -> Any:
            result = original(*args)
            if next(calls) < SOUND:
                return result
            return fails() if method == "catch_up" else result._replace(tokens=result.tokens + 320)

        with monkeypatch.context() as m:
            m.setattr(e.worker.drafters[arm], method, spoiled)
            while arm not in e.worker.quarantine and e.worker.quarantine.left_out[arm] < MOST_REQUESTS:
                comparison = Comparison(models.reference.target)
                answers = e.generate(PROMPTS, max_new_tokens=TOKENS)
                for prompt, own, text in zip(PROMPTS, plain, answers, strict=True):
                    comparison.check(prompt, own, text, comparison.summary())
        e.check_leaks()
        assert list(e.worker.snapshot()["quarantined"]) == [arm]
        faults = dict(e.worker.quarantine.faults)
        assert bool(faults.pop(arm)) == (method == "draft")
        assert not any(faults.values())
        (line,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        until = f"WHIFLASH: drafter {arm!r} is quarantined until the server is started again"
        assert line.getMessage().startswith(until)
        assert (line.exc_info is not None) == (method == "catch_up")
        for each in e.worker.drafters:
            assert published.values["quarantined", (each,)] == float(each == arm)
        assert published.values["faulty_drafts_total", (arm,)] == e.worker.quarantine.faults[arm]
        used, ingested = rounds_of(e), next(calls)
        e.generate(PROMPTS, max_new_tokens=TOKENS)
        assert {a for a, n in rounds_of(e).items() if n > used[a]} == used.keys() - {arm}
        assert next(calls) == ingested + 1, "it is called no more"


def test_an_error_of_one_request_takes_the_arms_from_nobody(
    models: Models, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One error is enough: what an arm keeps of the request may be half written."""
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        for arm, method in (("ar", "draft"), ("lookup", "handle")):

            def spoiled(given: Any, *more: Any, original: Any, **named: Any) -> Any:
                requests = [given] if isinstance(given, Request) else [e.states[row] for row in given.row_ids]
                return fails() if "poison" in [each.rid for each in requests] else original(given, *more, **named)

            drafter = e.worker.drafters[arm]
            monkeypatch.setattr(drafter, method, partial(spoiled, original=getattr(drafter, method)))
        names = ["g0", "poison", "g2", "g3"]
        for name, prompt in zip(names, PROMPTS, strict=True):
            e.submit(name, prompt, max_new_tokens=TOKENS)
        e.run()
        assert list(map(e.output, names)) == plain
        assert e.worker.quarantine.left_out == {name: int(name in ("ar", "lookup")) for name in e.worker.drafters}
        assert not e.worker.quarantine.reasons
        lines = {r.args[0]: r for r in caplog.records if "is left out" in r.getMessage()}  # type: ignore[index]
        assert lines.keys() == {"ar", "lookup"}
        for line in lines.values():
            assert "left out for request 'poison': raised RuntimeError" in line.getMessage()
            assert line.exc_info is not None
        used = rounds_of(e)
        e.generate(PROMPTS, max_new_tokens=TOKENS)
        assert rounds_of(e)["ar"] > used["ar"]


def fail(held: Quarantine, *tenants: bytes | None) -> None:
    """A request of each tenant, for which `ar` raises."""
    for tenant in tenants:
        request = Request("r", tenant=tenant, running=True)
        with held.guard("ar", request):
            fails()
        assert not held.serves("ar", request)
        held.end(request)


@pytest.mark.parametrize(
    ("tenants", "out"),
    [
        ([None] * MOST_REQUESTS, True),
        ([None] * (MOST_REQUESTS - 1), False),
        ([b"hostile"] * 99, False),
        ([b"hostile"] * 99 + [b"other"] * (MOST_REQUESTS // 2 - 1), False),
        ([b"hostile", b"other"] * (MOST_REQUESTS // 2), True),
    ],
)
def test_an_arm_is_out_for_everybody_after_many_requests_and_never_by_one_tenant(
    tenants: list[bytes | None], out: bool
) -> None:
    held = Quarantine(["ar", "diffusion"])
    fail(held, *tenants)
    wanted = {"ar": f"raised RuntimeError, for {MOST_REQUESTS} requests in a row"}
    assert held.reasons == (wanted if out else {})
    assert held.left_out == {"ar": len(tenants), "diffusion": 0}
    assert held.serves("diffusion", Request("next"))


def test_a_request_that_an_arm_served_well_to_its_end_excuses_it() -> None:
    held = Quarantine(["ar"])
    for _ in range(9):
        fail(held, *[None] * (MOST_REQUESTS - 1))
        sound = Request("sound", running=True)
        held.judge("ar", sound, faulty=False)
        held.end(sound)
    assert not held.reasons
    left_out, later = Request("left out", running=True), Request("later", running=True)
    held.judge("ar", left_out, faulty=False)
    held.raised("ar", ValueError(), left_out)
    held.judge("ar", left_out, faulty=False)  # planned before it was left out, and not asked any more
    held.judge("ar", later, faulty=True)
    for request in (left_out, later):
        held.end(request)
    fail(held, *[None] * (MOST_REQUESTS - 1))
    assert "ar" in held


def test_faults_in_a_row_are_what_counts() -> None:
    held, request = Quarantine(["ar", "diffusion"]), Request("r", running=True)
    for faulty in [*[True] * (MOST_FAULTS - 1), False] * 3:
        held.judge("ar", request, faulty=faulty)
        held.judge("diffusion", request, faulty=False)
    assert held.serves("ar", request)
    for _ in range(MOST_FAULTS):
        held.judge("ar", request, faulty=True)
        held.judge("ar", Request("gone"), faulty=True)  # results may be known after a request's end
    assert list(held.serving(["ar", "diffusion"], request)) == ["diffusion"]
    assert held.left_out["ar"] == 1
    assert held.faults == {"ar": 3 * (MOST_FAULTS - 1) + 2 * MOST_FAULTS, "diffusion": 0}


def test_a_batch_that_raises_is_asked_request_by_request() -> None:
    """Until one of them decides; if none of them raises alone, the batch does."""
    held = Quarantine(["ar"])
    requests = {index: Request(str(index), running=True) for index in (4, 1, 7)}
    calls: list[list[int]] = []

    def call(chosen: Any) -> list[int]:
        calls.append(list(chosen))
        return fails() if 1 in chosen else [10 * i for i in chosen]

    assert held.attempt("ar", requests, call) == ((), None)
    assert calls == [[4, 1, 7], [4], [1], [7]]
    assert [held.serves("ar", request) for request in requests.values()] == [True, False, True]
    assert held.attempt("ar", {4: requests[4]}, call) == ([4], [40])
    assert held.attempt("ar", {4: requests[4]}, fails) == ((), None)
    assert not held.serves("ar", requests[4])
    many = {i: Request(f"r{i}", running=True) for i in range(64)}
    assert held.attempt("ar", many, lambda chosen: (calls.append(chosen), fails())) == ((), None)
    assert "ar" in held
    assert len(calls) == 5 + 1 + MOST_REQUESTS - 2
    held, many = Quarantine(["ar"]), {i: Request(f"r{i}", running=True) for i in range(3)}
    assert held.attempt("ar", many, lambda chosen: fails() if len(chosen) > 1 else None) == ((), None)
    assert held.reasons == {"ar": "raised RuntimeError for a batch and for no request of it"}


def test_drafts_that_the_device_took_were_sound() -> None:
    """No plan names whose they are, so only the device's results show that it serves well."""
    held = Quarantine(["ar", "lookup"])
    requests = [Request("sound", running=True), Request("gone")]
    for request in requests:
        request.under_way.append(3)
    learner = Learner({}, MagicMock(), MagicMock(), MagicMock(), held, ("", "structure", "lookup", "lookup"))
    round_: Any = SimpleNamespace(
        requests=requests,
        decisions=[None] * 2,
        plan=SimpleNamespace(routes=["none"] * 2, limits=Limits([0] * 2, [0] * 2, [0] * 2, [0] * 2)),
        time=RoundTime(6, 2),
    )
    results = Results(*[None] * 12)._replace(
        starts=[9] * 2, widths=[3] * 2, faults=[0] * 2, first_drafts=[0] * 2, source=[-1, 0]
    )
    learner.learn(round_, results, kept=[[], []])
    assert requests[0].faults == {"lookup": 0}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_machine_raises_is_no_arms(error: Exception) -> None:
    held, request = Quarantine(["ar"]), Request("r", running=True)
    for way in (held.guard("ar"), held.guard("ar", request), held.guard_ingestion("ar")):
        with pytest.raises(type(error)), way:
            raise error

    def fails_too(_: Any) -> None:
        raise error

    for requests in ({0: request}, {0: request, 1: Request("other", running=True)}):
        with pytest.raises(type(error)):
            held.attempt("ar", requests, fails_too)
    assert held.serves("ar", request)


def test_several_ranks_agree() -> None:
    """Another rank may have drafted, so to go on without would leave it waiting in a collective call."""
    held, request = (Quarantine(["ar", "lookup"], alone=False, from_text=["lookup"]), Request("r", running=True))
    with held.guard("lookup", request):
        fails()
    assert not held.serves("lookup", request), "only the first rank asks it, so none waits"
    both = {0: request, 1: Request("other", running=True)}
    for raises in (held.guard("lookup"), held.guard("ar", request), held.guard_ingestion("ar")):
        with pytest.raises(RuntimeError, match="planted"), raises:
            fails()
    with pytest.raises(RuntimeError, match="planted"):
        held.attempt("ar", both, fails)
    assert not held.left_out["ar"]
    for _ in range(MOST_REQUESTS):
        request = Request("r", running=True)
        for _ in range(MOST_FAULTS):
            held.judge("ar", request, faulty=True)
    assert "ar" in held, "every rank judges the same results"
