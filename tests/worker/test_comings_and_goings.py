"""Everything at once: priorities, retractions, chunked prompts, the context's end, and aborts wherever a request is."""

import random
from collections import Counter
from typing import Any

import pytest
from engine import Engine, engine
from matrix import sampled
from model_set import Models
from reference import Comparison
from traffic import Arrival, play

CONTEXT = 96
COUNT = 48
OPTIONS: dict[str, Any] = {
    "context_length": CONTEXT,
    "max_running_requests": 4,
    "chunked_prefill_size": 16,
    "max_total_tokens": 240,
    "enable_priority_scheduling": True,
    "priority_scheduling_preemption_threshold": 1,
}


def arrivals(seed: int) -> list[Arrival]:
    """Half of them run to the end of the context, a third is aborted."""
    rng = random.Random(seed)
    shared = rng.choices(range(256), k=24)
    found = []
    for i in range(COUNT):
        prompt = rng.choices(range(256), k=rng.randint(2, 60))
        if rng.random() < 0.5:
            prompt = [*shared, *prompt]
        tokens = 10 * CONTEXT if rng.random() < 0.5 else rng.randint(1, 30)
        params = {"max_new_tokens": tokens, "priority": rng.randint(0, 5)}
        abort = rng.randint(0, 40) if rng.random() < 0.4 else None
        found.append(Arrival(f"r{i:02d}", rng.randint(0, 9 * COUNT), tuple(prompt), params, abort))
    return found


def where(e: Engine, rid: str) -> str:
    """The request is, as the scheduler sees it."""
    scheduler = e.scheduler
    if any(req.rid == rid for req in scheduler.waiting_queue):
        return "waits again" if e.requests[rid].output_ids else "waits"
    chunked = scheduler.chunked_req
    if chunked is not None and chunked.rid == rid:
        return "prompt"
    return "runs" if any(req.rid == rid for req in scheduler.running_batch.reqs) else "has ended"


@pytest.mark.parametrize("seed", sampled(range(12), 0, 1))
def test_text_is_plain_decodings_and_nothing_is_kept(
    seed: int, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = arrivals(seed)
    with engine(models.target, context_length=CONTEXT, max_running_requests=1) as e:
        plain = play(e, [Arrival(a.rid, 0, a.prompt, a.params) for a in asked])
    aborted: Counter[str] = Counter()
    with engine(models.target, whiflash=models.whiflash("random"), **OPTIONS) as e:
        abort = e.abort

        def noted(rid: str) -> None:
            aborted[where(e, rid)] += 1
            abort(rid)

        monkeypatch.setattr(e, "abort", noted)
        found = play(e, asked)  # ends with SGLang's own leak check
        assert not e.states
        assert not any(e.worker.quarantine.left_out.values())
    comparison = Comparison(models.reference.target)
    for a in asked:
        own = found[a.rid]
        expected = plain[a.rid] if a.abort_after is None else plain[a.rid][: len(own)]
        comparison.check(a.prompt, expected, own, a.rid)
    print(dict(aborted), comparison.summary())
    assert sum(aborted.values()) >= COUNT / 6
    assert aborted.keys() >= {"waits", "runs"}
