"""A drafter that misbehaves is left out and named; requests go on with the others, and no text changes."""

import logging
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any, NoReturn

import pytest
import torch
from engine import Engine, engine
from model_set import Models
from reference import Comparison

from whiflash_sglang.metrics.series import Labels, Series
from whiflash_sglang.round.quarantine import MOST_FAULTS, Quarantine

PROMPTS = [random.Random(i).choices(range(256), k=12 + 5 * i) * 2 for i in range(4)]
TOKENS = 40
SOUND = 3
"""Calls of the spoiled method that are as they were."""


def nan(values: torch.Tensor) -> torch.Tensor:
    return torch.full_like(values, torch.nan)


def fails(_: Any) -> NoReturn:
    raise RuntimeError("planted")


FAULTS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "ids above": ("ar", "draft", lambda d: replace(d, tokens=d.tokens + 320)),
    "ids below": ("diffusion", "draft", lambda d: replace(d, tokens=d.tokens - 320)),
    "confidences": ("ar", "draft", lambda d: replace(d, confidences=nan(d.confidences))),
    "chances": ("diffusion", "draft", lambda d: replace(d, alive=nan(d.alive))),
    "counts": ("ar", "draft", lambda d: replace(d, counts=d.counts - 100)),
    "draft raises": ("ar", "draft", fails),
    "catch-up raises": ("diffusion", "catch_up", fails),
    "outlook raises": ("lookup", "outlook", fails),
    "prolong raises": ("lookup", "prolong", fails),
    "begin raises": ("lookup", "begin", fails),
    "calibration raises": ("ar", "calibration", fails),
    "observe raises": ("ar", "observe", fails),
    "finish raises": ("lookup", "finish", fails),
}


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


def watch(monkeypatch: pytest.MonkeyPatch, drafter: Any) -> list[str]:
    """What a drafter is asked from now on, but for what it is to drop."""
    asked: list[str] = []
    for method in ("begin", "catch_up", "calibration", "outlook", "draft", "prolong", "observe", "finish"):
        original = getattr(drafter, method)

        def noted(*args: Any, original: Any = original, method: str = method) -> Any:
            asked.append(method)
            return original(*args)

        monkeypatch.setattr(drafter, method, noted)
    return asked


@pytest.mark.parametrize("resident", [False, True])
def test_requests_go_on_without_it(
    models: Models,
    plain: list[list[int]],
    resident: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if resident:
        monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    with engine(models.target, whiflash=models.whiflash("random")) as e:
        gauges = Gauges()
        e.worker.publish_to(gauges)
        for name, (arm, method, made) in FAULTS.items():
            before = dict(e.worker.quarantine.faults)
            caplog.clear()
            with monkeypatch.context() as m:
                spoil(m, e.worker.drafters[arm], method, made)
                found = e.generate(PROMPTS, max_new_tokens=TOKENS)
            comparison = Comparison(models.reference.target)
            for prompt, own, text in zip(PROMPTS, plain, found, strict=True):
                comparison.check(prompt, own, text, f"{name}, {comparison.summary()}")
            e.check_leaks()
            out = e.worker.snapshot()["quarantined"]
            assert list(out) == [arm], name
            # With the faults of one round several requests' drafts are judged behind the one that decided.
            faults = {a: n - before[a] for a, n in e.worker.quarantine.faults.items()}
            assert faults.pop(arm) >= (MOST_FAULTS if "raises" not in name else 0), name
            assert not any(faults.values()), name
            (line,) = [r for r in caplog.records if r.levelno == logging.ERROR]
            assert line.getMessage().startswith(f"WHIFLASH: drafter {arm!r} is quarantined")
            assert (line.exc_info is not None) == ("raises" in name)
            assert {a: gauges["quarantined", (a,)] for a in e.worker.drafters} == {
                a: float(a == arm) for a in e.worker.drafters
            }
            assert gauges["faulty_drafts_total", (arm,)] == e.worker.quarantine.faults[arm]
            used = rounds_of(e)
            with monkeypatch.context() as m:
                asked = watch(m, e.worker.drafters[arm])
                e.generate(PROMPTS, max_new_tokens=TOKENS)
            assert not asked, f"{name}: {arm} is still asked to {asked[0]}"
            assert {a for a, n in rounds_of(e).items() if n > used[a]} == used.keys() - {arm}, name
            e.worker.quarantine.reasons.clear()
            e.start_over("random")
        for arm in ("ar", "diffusion"):
            assert all(map(math.isfinite, e.worker.drafters[arm].calibration([])))


def rounds_of(e: Engine) -> dict[str, int]:
    counted = e.worker.tally.by_arm.items()
    return {arm: counts.rounds for arm, counts in counted if arm != "structure"}


def test_one_requests_text_takes_the_arm_from_nobody(
    models: Models, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its drafts are left out, every time, while its neighbours' are sound."""
    with engine(models.target, whiflash=models.whiflash("ar")) as e:
        drafter = e.worker.drafters["ar"]
        original = drafter.draft

        def spoiled(batch: Any) -> Any:
            drafts = original(batch)
            drafts.tokens[[e.lanes[row].rid == "spoiled" for row in batch.row_ids]] = 1 << 40
            return drafts

        monkeypatch.setattr(drafter, "draft", spoiled)
        for i, prompt in enumerate(PROMPTS):
            e.submit("spoiled" if i == 1 else f"g{i}", prompt, max_new_tokens=8 if i == 1 else TOKENS)
        e.run()
        assert e.output("spoiled") == plain[1][:8]
        assert e.rounds("spoiled")[1] == 0
        assert [e.output(f"g{i}") for i in (0, 2, 3)] == [plain[0], plain[2], plain[3]]
        assert e.worker.quarantine.faults["ar"] > MOST_FAULTS
        assert not e.worker.quarantine.reasons


def test_faults_in_a_row_are_what_counts() -> None:
    held = Quarantine(["ar", "diffusion"])
    for faulty in [*[True] * (MOST_FAULTS - 1), False] * 3:
        held.judge("ar", faulty=faulty)
        held.judge("diffusion", faulty=False)
    assert held.faults == {"ar": 3 * (MOST_FAULTS - 1), "diffusion": 0}
    assert "ar" not in held
    for _ in range(MOST_FAULTS):
        held.judge("ar", faulty=True)
    assert "ar" in held
    assert "diffusion" not in held


def test_what_one_of_several_ranks_raises_is_raised() -> None:
    """Another rank may have drafted: to go on without would leave it waiting in a collective call."""
    held = Quarantine(["ar"], alone=False)
    with pytest.raises(RuntimeError, match="planted"), held.guard("ar"):
        fails(None)
    assert not held.reasons
