"""Requests that arrive, leave and are aborted at different times, played against an in-process engine."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine import Engine
from tiny_models import FAVOURED_TOKENS


@dataclass(frozen=True)
class Arrival:
    """A request that arrives before step `step`; `abort_after`: it is aborted that many steps later."""

    rid: str
    step: int
    prompt: tuple[int, ...]
    params: dict[str, Any] = field(default_factory=dict)
    abort_after: int | None = None


def play(
    engine: Engine, arrivals: Sequence[Arrival], on_step: Callable[[], None] = lambda: None
) -> dict[str, list[int]]:
    """Run everything to its end; the outputs by request."""
    for step in _steps(engine, arrivals):
        for arrival in arrivals:
            if arrival.step == step:
                engine.submit(arrival.rid, arrival.prompt, **arrival.params)
            if arrival.abort_after is not None and arrival.step + arrival.abort_after == step:
                engine.abort(arrival.rid)
        engine.step()
        on_step()
    engine.check_leaks()
    return {arrival.rid: engine.output(arrival.rid) for arrival in arrivals}


def _steps(engine: Engine, arrivals: Sequence[Arrival]) -> Iterator[int]:
    last = max((a.step + (a.abort_after or 0) for a in arrivals), default=0)
    for step in range(100_000):
        if step > last and not engine.waiting and engine.scheduler.is_fully_idle():
            return
        yield step
    raise AssertionError("the engine never became idle")


def mixed(
    seed: int,
    count: int,
    *,
    shared: int = 0,
    longest: int = 60,
    aborts: float = 0.0,
    stops: float = 0.0,
    tokens: int = 40,
) -> list[Arrival]:
    """`count` seeded requests: random prompts, some with a common prefix, different lengths and times.

    Args:
        shared: tokens of the prefix that half of the prompts share (the radix tree serves it).
        aborts: share of requests that are aborted while they run. stops: share that have stop tokens.
    """
    rng = random.Random(seed)
    prefix = rng.choices(range(256), k=shared)
    arrivals = []
    for i in range(count):
        prompt = rng.choices(range(256), k=rng.randint(2, longest))
        if shared and rng.random() < 0.5:
            prompt = prefix[: rng.randint(shared // 2, shared)] + prompt
        arrivals.append(
            Arrival(
                f"r{i:04d}",
                rng.randint(0, 3 * count // 2),
                tuple(prompt),
                {
                    "max_new_tokens": rng.randint(1, tokens),
                    "stop_token_ids": rng.sample(FAVOURED_TOKENS, 2) if rng.random() < stops else None,
                },
                rng.randint(1, 8) if rng.random() < aborts else None,
            )
        )
    return arrivals


def without_a_pass(controller: Any, requests: Sequence[Any], _: Any) -> list[str]:
    """In place of `Controller.route`: no model drafts, and what draft sources propose is verified."""
    for request in requests:
        request.decision.promised = True
    return ["none"] * len(requests)
