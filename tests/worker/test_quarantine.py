"""A drafter that misbehaves is left out and named, for one request or for all; no text changes."""

import logging
import random
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import MagicMock

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from reference import Comparison

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.device.transfers import EXACT
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.core import Limits, Results
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.round.planning import Planner
from whiflash_sglang.round.quarantine import (
    FIRST_SECONDS,
    LONGEST_SECONDS,
    MANY_REQUESTS,
    MOST_FAULTS,
    SEVERAL_REQUESTS,
    Quarantine,
)
from whiflash_sglang.round.sources import DraftSources
from whiflash_sglang.serve.metrics import Labels, Series
from whiflash_sglang.structure.spending import Spending

PROMPTS = [random.Random(i).choices(range(256), k=12 + 5 * i) * 2 for i in range(4)]
TOKENS = 40
SOUND = 3
"""Calls of the spoiled method that are as they were."""


def nan(values: torch.Tensor) -> torch.Tensor:
    return torch.full_like(values, torch.nan)


def fails(_: Any) -> NoReturn:
    raise RuntimeError("planted")


FAULTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "ids": ("ar", "draft", lambda d: d._replace(tokens=d.tokens + 320)),
    "chances": ("diffusion", "draft", lambda d: d._replace(alive=nan(d.alive))),
    "ids of a candidate": ("lookup", "propose", lambda v: v and v._replace(tokens=[1 << 40] * len(v.tokens))),
    "ids behind drafts": ("lookup", "extend_drafts", lambda v: v.followed_by([1 << 40], [0.5], "context")),
    "catch-up raises": ("diffusion", "catch_up", fails),
    "calibration raises": ("ar", "calibration", fails),
    "copies raise": ("lookup", "copy", fails),
}
"""For everybody. Other drafts that cannot be any: `kernels/tests/test_drafts.py`, `test_candidates.py`."""
RESIDENT = ("ids", "chances", "copies raise")
"""Faults asked in another way if the host reads nothing from the device."""


class Gauges(dict[tuple[str, Labels], float]):
    """The newest of what is written; counters are summed up."""

    def write(self, series: Series, labels: Labels, number: float) -> None:
        key = series.name, labels
        self[key] = self.get(key, 0) + number if series.kind == "counter" else number


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    with engine(models.target) as e:
        return e.generate(PROMPTS, max_new_tokens=TOKENS)


def spoil(monkeypatch: pytest.MonkeyPatch, drafter: Any, method: str, made: Callable[[Any], Any]) -> None:
    original, calls = getattr(drafter, method), count()

    def spoiled(*args: Any) -> Any:
        result = original(*args)
        return result if next(calls) < SOUND else made(result)

    monkeypatch.setattr(drafter, method, spoiled)


@pytest.mark.parametrize("resident", [False, True])
def test_requests_go_on_without_it(
    models: Models,
    plain: list[list[int]],
    resident: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", str(int(resident)))
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        gauges = Gauges()
        e.worker.publisher.start(gauges)
        for name, (arm, method, made) in FAULTS.items():
            if (name in RESIDENT) != resident and name != "ids":
                continue
            before = dict(e.worker.quarantine.faults)
            caplog.clear()
            with monkeypatch.context() as m:
                spoil(m, e.worker.drafters[arm], method, made)
                for _ in range(15):  # until it was faulty for several requests
                    found = ask(e)
                    comparison = Comparison(models.reference.target)
                    for prompt, own, text in zip(PROMPTS, plain, found, strict=True):
                        comparison.check(prompt, own, text, f"{name}, {comparison.summary()}")
                    if arm in e.worker.quarantine:
                        break
            e.check_leaks()
            assert list(e.worker.snapshot()["quarantined"]) == [arm], name
            # With the faults of one round several requests' drafts are judged behind the one that decided.
            faults = {a: n - before[a] for a, n in e.worker.quarantine.faults.items()}
            assert faults.pop(arm) >= (MOST_FAULTS if made is not fails else 0), name
            assert not any(faults.values()), name
            (line,) = [r for r in caplog.records if r.levelno == logging.ERROR]
            until = "until the server is started again" if method == "catch_up" else "for 60 s"
            assert line.getMessage().startswith(f"WHIFLASH: drafter {arm!r} is quarantined {until}")
            assert (line.exc_info is not None) == (made is fails)
            assert {a: gauges["quarantined", (a,)] for a in e.worker.drafters} == {
                a: float(a == arm) for a in e.worker.drafters
            }
            assert gauges["faulty_drafts_total", (arm,)] == e.worker.quarantine.faults[arm]
            used = rounds_of(e)
            e.generate(PROMPTS, max_new_tokens=TOKENS)
            assert {a for a, n in rounds_of(e).items() if n > used[a]} == used.keys() - {arm}, name
            e.worker.quarantine.__init__(e.worker.drafters)  # type: ignore[misc]
            e.start_over("random")


def ask(e: Engine) -> list[list[int]]:
    """Answers to `PROMPTS`, which two callers send."""
    rids = [f"a{len(e.requests):06d}-{i}" for i in range(len(PROMPTS))]
    for i, (rid, prompt) in enumerate(zip(rids, PROMPTS, strict=True)):
        e.submit(rid, prompt, max_new_tokens=TOKENS, cache_salt="ab"[i % 2])
    e.run()
    return [e.output(rid) for rid in rids]


def rounds_of(e: Engine) -> dict[str, int]:
    counted = e.worker.tally.by_arm.items()
    return {arm: counts.rounds for arm, counts in counted if arm != "structure"}


@pytest.fixture(scope="module")
def shared(models: Models, plain: list[list[int]]) -> Iterator[Engine]:
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        yield e


@pytest.fixture
def running(shared: Engine) -> Engine:
    """For the tests below, since no other engine may run beside it."""
    shared.worker.quarantine.__init__(shared.worker.drafters)  # type: ignore[misc]
    shared.start_over("random")
    shared.requests.clear()
    return shared


@pytest.mark.parametrize(
    ("arm", "method"),
    [
        ("ar", "draft"),
        ("lookup", "extend_drafts"),
        ("lookup", "propose"),
        ("lookup", "begin"),
        ("ar", "observe"),
        ("lookup", "end"),
    ],
)
def test_an_error_of_one_request_takes_the_arm_from_nobody(
    running: Engine,
    plain: list[list[int]],
    arm: str,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One error is enough: what the arm keeps of the request may be half written."""
    e, quarantine = running, running.worker.quarantine
    raised = plant(e, monkeypatch, arm, method, "poison")
    for i, prompt in enumerate(PROMPTS):
        e.submit("poison" if i == 1 else f"g{i}", prompt, max_new_tokens=TOKENS)
    e.run()
    assert [e.output("poison" if i == 1 else f"g{i}") for i in range(4)] == plain
    assert raised
    assert quarantine.left_out == {name: int(name == arm) for name in e.worker.drafters}
    assert not quarantine.reasons
    (line,) = [r for r in caplog.records if "is left out" in r.getMessage()]
    assert f"drafter {arm!r} is left out for request 'poison': raised RuntimeError" in line.getMessage()
    assert line.exc_info is not None
    used = rounds_of(e)
    e.generate(PROMPTS, max_new_tokens=TOKENS)
    assert rounds_of(e)[arm] > used[arm]


def plant(e: Engine, monkeypatch: pytest.MonkeyPatch, arm: str, method: str, name: str) -> list[str]:
    """Let `method` of `arm` raise whenever it works for the request `name`; when it did, is added to the result."""
    drafter, raised = e.worker.drafters[arm], list[str]()
    original = getattr(drafter, method)

    def rows_of(given: Any) -> Any:
        return getattr(given, "row_ids", [given])

    def spoiled(given: Any, *more: Any, **named: Any) -> Any:
        rids = [given.rid] if isinstance(given, Request) else [e.states[row].rid for row in rows_of(given)]
        if name in rids:
            raised.append(name)
            raise RuntimeError("planted")
        return original(given, *more, **named)

    monkeypatch.setattr(drafter, method, spoiled)
    return raised


def begun(held: Quarantine, rid: str = "r", caller: str | None = None) -> Request:
    request = Request(rid, caller=caller, running=True)
    held.begin(request)
    return request


class History:
    """A quarantine, its clock, and requests for which arms raise."""

    def __init__(self, *arms: str) -> None:
        self.now = 0.0
        self.held = Quarantine(arms or ["ar"], clock=lambda: self.now)

    def fail(self, *callers: str | None, arm: str = "ar") -> None:
        """A request of each caller, for which the arm raises."""
        for caller in callers:
            request = begun(self.held, caller=caller)
            with self.held.guard(arm, request):
                fails(None)
            assert not self.held.serves(arm, request)
            self.held.end(request)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.held.tick()


def test_an_arm_is_out_for_everybody_behind_several_requests_of_several_callers() -> None:
    """One caller takes it from nobody, and so many in a row are the arm's fault, whoever sent them."""
    history = History("ar", "diffusion")
    held = history.held
    history.fail(*[None] * (MANY_REQUESTS - 1))
    assert not held.reasons
    history.fail("two")
    assert held.reasons == {"ar": f"raised RuntimeError, for {MANY_REQUESTS} requests in a row"}
    assert held.left_out == {"ar": MANY_REQUESTS, "diffusion": 0}
    during = begun(held, caller="three")
    for turn in range(10):
        seconds = min(FIRST_SECONDS * 2**turn, LONGEST_SECONDS)
        history.wait(seconds - 1)
        assert "ar" in held
        history.wait(1)
        assert "ar" not in held
        history.fail("one", "one", "two")
        assert "ar" in held, "it is out again, for twice as long"
    history.wait(LONGEST_SECONDS)
    assert not held.serves("ar", during), "what began without it goes on without it"
    assert held.serves("diffusion", during)
    history.fail(*[None] * MANY_REQUESTS)
    assert "ar" in held


def test_a_request_that_an_arm_served_well_excuses_it() -> None:
    """But none that it served before a quarantine, or that was planned then and not asked any more."""
    history = History()
    held = history.held
    for number in range(9):
        history.fail(None, None)
        sound = begun(held, f"sound {number}")
        held.judge("ar", sound, faulty=False)
        held.end(sound)
    assert held.left_out == {"ar": 18}
    assert not held.reasons
    before, planned = begun(held, "before"), begun(held, "planned")
    held.judge("ar", before, faulty=False)
    history.fail("one", "one", "two")
    held.judge("ar", planned, faulty=False)
    history.wait(FIRST_SECONDS)
    for request in (before, planned):
        held.end(request)
    history.fail("one", "one", "two")
    history.wait(FIRST_SECONDS)
    assert "ar" in held, "it is out again, for twice as long"


def test_holes_in_its_kv_end_no_more_than_the_server_does() -> None:
    """An arm goes on ingesting while it is quarantined, and may fail at that, too."""
    history = History()
    history.fail("one", "one", "two")
    with history.held.guard_ingestion("ar"):
        fails(None)
    history.wait(2 * LONGEST_SECONDS)
    assert not history.held.ingests("ar")
    assert history.held.reasons == {"ar": "raised RuntimeError while it ingested"}


def test_faults_in_a_row_are_what_counts(caplog: pytest.LogCaptureFixture) -> None:
    """A failure behind a quarantine counts for no other one: results of rounds that were under way."""
    history = History("ar", "diffusion")
    held = history.held
    requests = [begun(held, f"r{i}", f"r{i}") for i in range(9)]
    for faulty in [*[True] * (MOST_FAULTS - 1), False] * 3:
        held.judge("ar", requests[0], faulty=faulty)
        held.judge("diffusion", requests[0], faulty=False)
    assert held.faults == {"ar": 3 * (MOST_FAULTS - 1), "diffusion": 0}
    assert held.serves("ar", requests[0])
    for request in requests:
        for _ in range(MOST_FAULTS):
            held.judge("ar", request, faulty=True)
    held.judge("ar", Request("gone"), faulty=True)  # results may be known behind a request's end
    assert "ar" in held
    assert held.serves("diffusion", requests[0])
    assert sum("is left out" in r.getMessage() for r in caplog.records) == SEVERAL_REQUESTS
    history.wait(FIRST_SECONDS)
    assert not any(held.serves("ar", request) for request in requests)
    history.fail("another")
    assert not held.reasons, "the next one request is one again"


def test_a_batch_that_raises_is_asked_request_by_request() -> None:
    """Until the request that decides; if none of them raises alone, the batch does."""
    held = Quarantine(["ar"])
    requests = {index: begun(held, str(index), str(index)) for index in (4, 1, 7)}
    calls: list[list[int]] = []

    def call(chosen: Any) -> list[int]:
        calls.append(list(chosen))
        if 1 in chosen:
            raise RuntimeError("planted")
        return [10 * i for i in chosen]

    assert held.attempt("ar", requests, call) == ([4, 7], [40, 70])
    assert calls == [[4, 1, 7], [4], [1], [7], [4, 7]]
    assert [held.serves("ar", request) for request in requests.values()] == [True, False, True]
    assert held.attempt("ar", {1: requests[1]}, lambda _: fails(None)) == ((), None)

    def together(chosen: Any) -> None:
        if len(chosen) > 1:
            raise RuntimeError("planted")

    assert held.attempt("ar", requests, together) == ((), None)
    assert held.reasons == {"ar": "raised RuntimeError for a batch and for no request of it"}
    held, asked = Quarantine(["ar"]), list[Any]()
    many = {i: begun(held, f"r{i}", f"r{i}") for i in range(64)}
    assert held.attempt("ar", many, lambda chosen: (asked.append(chosen), fails(None))) == ((), None)
    assert "ar" in held
    assert len(asked) == 1 + SEVERAL_REQUESTS


def test_the_rest_of_a_batch_is_not_asked() -> None:
    held, asked = Quarantine(["lookup"]), list[int]()

    class Failing(TextDrafter):
        max_drafts = 1

        def propose(self, request: Request, *_: Any, **__: Any) -> NoReturn:
            asked.append(request.row)
            fails(None)

    drafters: Any = {"lookup": Failing()}
    nothing: Any = None
    controller: Any = SimpleNamespace(states={})
    sources = DraftSources(drafters, held, 99, Spending())
    planner = Planner(drafters, nothing, controller, nothing, held, sources, EXACT)
    turn: Any = SimpleNamespace(
        requests=[Request(f"r{row}", row=row, caller=row, running=True) for row in range(64)],
        most=[9] * 64,
        plan=SimpleNamespace(worth={"lookup": FULL_LENGTH}),
        history=lambda *_: [],
    )
    for index, request in enumerate(turn.requests):
        held.begin(request)
        assert planner._proposed(turn, index, ["lookup"]) == ({}, {})
    assert asked == [*range(SEVERAL_REQUESTS)]


def test_drafts_that_the_device_took_were_sound() -> None:
    """No plan names whose they are, so only the device's results show that it serves well."""
    history = History("ar", "lookup")
    held = history.held
    requests = [begun(held, "sound"), Request("gone")]
    for request in requests:
        request.under_way.append(3)
    proposers = ("", "structure", "lookup", "lookup")
    learner = Learner({}, MagicMock(), MagicMock(), MagicMock(), held, proposers)
    turn: Any = SimpleNamespace(
        parts=None,
        accepted=(),
        requests=requests,
        decisions=[None] * 2,
        plan=SimpleNamespace(routes=["none"] * 2, limits=Limits([0] * 2, [0] * 2, [0] * 2, [0] * 2)),
        bounded=True,
    )
    history.fail("one", "one", arm="lookup")
    results = Results(*[None] * 12)._replace(
        starts=[9] * 2, widths=[3] * 2, faults=[0] * 2, first_drafts=[0] * 2, source=[-1, 0]
    )
    learner.learn(turn, results, kept=[[], []])
    held.end(requests[0])
    history.fail("two", arm="lookup")
    assert not held.reasons


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
    held = Quarantine(["ar"])
    request = begun(held)
    for ways in (held.guard("ar"), held.guard("ar", request), held.guard_ingestion("ar")):
        with pytest.raises(type(error)), ways:
            raise error

    def fails_too(_: Any) -> None:
        raise error

    for requests in ({0: request}, {0: request, 1: begun(held)}):
        with pytest.raises(type(error)):
            held.attempt("ar", requests, fails_too)
    assert held.serves("ar", request)


def test_several_ranks_agree() -> None:
    """Another rank may have drafted, so to go on without would leave it waiting in a collective call. Clocks differ."""
    clock: Any = lambda: pytest.fail("a rank's clock is its own")  # noqa: E731
    held = Quarantine(["ar", "lookup"], alone=False, from_text=["lookup"], clock=clock)
    request = begun(held)
    with held.guard("lookup", request):
        fails(None)
    assert not held.serves("lookup", request), "it raises in every rank alike"
    with pytest.raises(RuntimeError, match="planted"), held.guard("lookup"):
        fails(None)
    with pytest.raises(RuntimeError, match="planted"), held.guard("ar", request):
        fails(None)
    with pytest.raises(RuntimeError, match="planted"):
        held.attempt("ar", {0: request, 1: begun(held)}, lambda _: fails(None))
    assert not held.left_out["ar"]
    for caller in "abc":
        request = begun(held, caller=caller)
        for _ in range(MOST_FAULTS):
            held.judge("ar", request, faulty=True)
    held.tick()
    assert "ar" in held
