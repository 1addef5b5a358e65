"""The worker under SGLang's overlap loop: where the host waits, what is late. Its texts: `test_plain_text.py`."""

import random
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import pytest
from matrix import sampled
from model_set import Models
from overlap import overlapped, publishing
from plain import plain_texts
from request_sets import CONSTRAINED, GRAMMARS, OPTIONS
from sglang.srt.managers.scheduler import Scheduler
from traffic import Arrival, play

from whiflash_sglang.engine.forward.target import Target

FREE = {"max_new_tokens": 50}
MASKS = "whiflash_sglang/engine/forward/masks.py"


@pytest.fixture(autouse=True)
def as_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "verify", publishing(Target.verify))


def test_a_flush_that_does_not_follow_the_forward_is_found(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request's parked features go into the tree's slots when it ends, while a round of it is under way."""
    from whiflash_sglang.engine.scheduler import releases

    monkeypatch.setattr(releases, "behind_forward", lambda _: nullcontext())
    with overlapped(models.target, whiflash=models.whiflash("none"), host_lengths=False) as e:
        e.submit("ends first", list(range(20)), max_new_tokens=9)
        e.submit("goes on", list(range(30, 60)), max_new_tokens=30)
        e.run()
        races = set(e.streams.races)
    assert any("schedule reads what forward wrote" in race and "backlog" in race for race in races), races


@pytest.mark.parametrize("temperature", sampled([0.0, 1.0], 1.0))
def test_the_host_waits_for_nothing(
    models: Models, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole loop of the scheduler: prefills in chunks and from the tree, rounds, results, releases, an abort.

    SGLang's own wait for the results of the round before is an event's, and no copy is pageable.
    """
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    prompts = [(1 + i, 2, 3, 1 + i, 2, 3, *range(40, 70), 1 + i, 2) for i in range(6)]
    arrivals = [
        Arrival(f"r{i}", 3 * i, prompt, {"max_new_tokens": 12 + 7 * i, "temperature": temperature}, aborted)
        for i, (prompt, aborted) in enumerate(zip(prompts, [None, None, 6, None, 5, None], strict=True))
    ]
    arrivals.append(Arrival("again", 20, (*prompts[0], 5), {"max_new_tokens": 9, "temperature": temperature}))
    with overlapped(
        models.target, whiflash=models.whiflash("random"), host_lengths=False, chunked_prefill_size=24
    ) as e:
        play(e, arrivals)
        stalls, pageable, races = dict(e.streams.stalls), dict(e.streams.pageable), dict(e.streams.races)
        assert e.requests["again"].cached_tokens
    assert not races
    assert not stalls, stalls
    print("pageable", pageable)
    ours = {site: count for site, count in pageable.items() if site.startswith("whiflash")}
    assert not ours, ours


def test_what_is_said_a_round_late_is_drafted(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction, of which the host knows how far the text is only when the next round has begun."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    prompt, tokens = [random.Random(3).randrange(256) for _ in range(20)], 60
    with overlapped(models.target, whiflash=models.whiflash("lookup"), host_lengths=False) as e:
        e.submit("first", prompt, max_new_tokens=tokens)
        e.run()
        custom = {"whiflash_prediction": e.output("first")}
        e.submit("again", prompt, max_new_tokens=tokens, custom_params=custom)
        e.run()
        races, stalls, pageable = dict(e.streams.races), dict(e.streams.stalls), set(e.streams.pageable)
        assert e.output("again") == e.output("first")
        verified, accepted = e.rounds("again")
    assert accepted > 0.8 * tokens
    assert verified < tokens / 4
    assert not races
    assert not stalls
    assert not {site for site in pageable if site.startswith("whiflash")}


@pytest.mark.parametrize("backend", ["xgrammar", "llguidance"])
@pytest.mark.parametrize("share", sampled(["one", "half", "all"], "half"))
def test_a_grammar_takes_the_overlap_from_nobody(
    models: Models, share: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its masks are made while the target runs; the host waits for what was drafted, and for nothing else."""
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    every = {"one": 6, "half": 2, "all": 1}[share]
    kinds = cycle([*(CONSTRAINED[name] for name in ("penalised", "cut-short")), *GRAMMARS.values()])
    arrivals = [
        Arrival(f"r{i}", 2 * i, tuple(range(30 + i, 60 + i)), next(kinds) if i % every == 0 else FREE)
        for i in range(12)
    ]
    options = {**OPTIONS, "grammar_backend": backend}
    expected = plain_texts(models.target, arrivals, **options)
    judged, disabled = Scheduler.is_disable_overlap_for_batch, []

    def noted(scheduler: Any, batch: Any, last_batch: Any) -> bool:
        disabled.append(judged(scheduler, batch, last_batch) and batch.forward_mode.is_decode())
        return judged(scheduler, batch, last_batch)

    monkeypatch.setattr(Scheduler, "is_disable_overlap_for_batch", noted)
    flags = models.whiflash("random")
    with overlapped(models.target, whiflash=flags, host_lengths=False, **options) as e:
        assert play(e, arrivals) == expected
        races, stalls, waits = dict(e.streams.races), dict(e.streams.stalls), dict(e.streams.waits_of_host)
        pageable = {site for site in e.streams.pageable if site.startswith("whiflash")}
        accepted = sum(e.rounds(a.rid)[1] for a in arrivals if a.params is not FREE)
    assert len(disabled) > 30
    assert not any(disabled)
    assert accepted > 0
    assert not races
    assert not stalls, stalls
    assert not pageable
    assert all(site.startswith(MASKS) for site in waits if site.startswith("whiflash"))
