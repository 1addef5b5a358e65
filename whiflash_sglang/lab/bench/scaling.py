"""How a round's cost grows with the batch and with the context: a sweep over one WHIFLASH server."""

import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict

from whiflash_sglang.lab.bench.cells import RoundMs, round_ms_of

BATCHES = (1, 2, 4, 8)
CONTEXTS = (128, 512, 1024, 2048, 4096)
SHORT = 256
NEW_TOKENS = 64


class Setting(NamedTuple):
    """Requests decoded together, and prompt tokens of each."""

    batch: int
    context: int


class ScalePoint(BaseModel):
    """Mean round of `batch` requests whose prompts have `context` tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    batch: int
    context: int
    round_ms: RoundMs


def settings(kv_tokens: int, context_length: int) -> list[Setting]:
    """Every batch at a short context, every context alone, as far as the server holds them."""
    wanted = [Setting(b, SHORT) for b in BATCHES] + [Setting(1, c) for c in CONTEXTS]
    longest = context_length - NEW_TOKENS - 1
    return [
        s for s in wanted if s.context <= longest and s.batch * (s.context + NEW_TOKENS) * 1.5 <= kv_tokens
    ]


def measure(
    client: httpx.Client,
    setting: Setting,
    vocabulary: int,
    state: Callable[[], Mapping[str, float]],
    *,
    seed: int = 0,
) -> ScalePoint:
    """Ask `setting.batch` random prompts at once and read the worker's clock around them.

    Random tokens copy nothing and cache nothing: the contexts are as long as they say. Rounds before the whole batch
    has been prefilled are among the mean; the prompts differ in nothing else.
    """
    source = random.Random(f"{seed} {setting}")
    bodies = [
        {
            "input_ids": [source.randrange(vocabulary) for _ in range(setting.context)],
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        }
        for _ in range(setting.batch)
    ]
    before = state()
    with ThreadPoolExecutor(setting.batch) as users:
        for response in users.map(lambda body: client.post("/generate", json=body), bodies):
            response.raise_for_status()
    after = state()
    return ScalePoint(
        batch=setting.batch,
        context=setting.context,
        round_ms=round_ms_of({key: after[key] - before[key] for key in after}),
    )
