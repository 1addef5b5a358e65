"""Two hundred requests with random aborts leave nothing behind: no slot, no lane, no memory."""

import gc
import random

import psutil
from engine import Engine, engine
from model_set import Models
from traffic import Arrival, play

HALF = 100
NOISE = 12 * 2**20
"""Bytes that a process may grow by between two states of the same kind (allocator, lazily built tables)."""


def requests(half: int) -> list[Arrival]:
    rng = random.Random(half)
    stem = rng.choices(range(256), k=48)
    return [
        Arrival(
            f"h{half}-{i:04d}",
            rng.randint(0, 2 * HALF),
            tuple(stem[: rng.randint(0, 48)] + rng.choices(range(256), k=rng.randint(1, 30))),
            {
                "max_new_tokens": rng.randint(1, 40),
                "temperature": rng.choice([0.0, 0.8]),
                "frequency_penalty": rng.choice([0.0, 0.3]),
            },
            rng.randint(0, 12) if rng.random() < 0.4 else None,
        )
        for i in range(HALF)
    ]


def settled_memory(e: Engine) -> int:
    """Resident bytes once the requests are forgotten."""
    e.requests.clear()
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def test_two_hundred_requests_with_aborts(models: Models) -> None:
    memory = []
    with engine(
        models.target,
        whiflash=models.whiflash("random"),
        max_running_requests=6,
        max_total_tokens=1024,
        chunked_prefill_size=32,
    ) as e:
        for half in range(2):
            outputs = play(e, requests(half))  # ends with SGLang's own leak check
            assert len(outputs) == HALF
            assert e.lanes == {}
            assert not any(e.worker.sync.watermarks.known(row) for row in range(64))
            memory.append(settled_memory(e))
        assert e.scheduler.flush_cache()
        free = e.scheduler.token_to_kv_pool_allocator.available_size()
        assert free == e.scheduler.max_total_num_tokens
    print(f"from request {HALF} to {2 * HALF} the process grew by {(memory[1] - memory[0]) / 2**20:.1f} MiB")
    assert memory[1] - memory[0] < NOISE
