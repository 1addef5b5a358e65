"""Requests of a higher priority push others out of the batch: these go on later, with the text of plain decoding."""

import random
from typing import Any

from engine import Engine, engine
from model_set import Models
from traffic import Arrival, play

OPTIONS: dict[str, Any] = {
    "max_running_requests": 2,
    "enable_priority_scheduling": True,
    "priority_scheduling_preemption_threshold": 1,
}


def arrivals() -> list[Arrival]:
    """Low priorities first; while these run, high ones."""
    rng = random.Random(4)
    prompts = [tuple(rng.choices(range(256), k=rng.randint(5, 40))) for _ in range(6)]
    low = [
        Arrival(f"low-{i}", 0, p, {"max_new_tokens": 40, "priority": 0}) for i, p in enumerate(prompts[:3])
    ]
    high = [
        Arrival(f"high-{i}", 4 + 3 * i, p, {"max_new_tokens": 12, "priority": 5})
        for i, p in enumerate(prompts[3:])
    ]
    return [*low, *high]


def served(e: Engine) -> tuple[dict[str, list[int]], set[str]]:
    """Outputs, and who had begun and was waiting again."""
    pushed: set[str] = set()

    def look() -> None:
        pushed.update(req.rid for req in e.scheduler.waiting_queue if req.output_ids)

    return play(e, arrivals(), look), pushed


def test_who_is_pushed_out_goes_on_with_plain_decodings_text(models: Models) -> None:
    with engine(models.target, **OPTIONS) as e:
        expected, pushed = served(e)
    assert pushed
    for router in ("random", "auto"):
        with engine(models.target, whiflash=models.whiflash(router), **OPTIONS) as e:
            found, pushed = served(e)
        assert found == expected
        assert pushed
