"""Flags that launches for agents have: text is plain decoding's under the same flags."""

from typing import Any

import pytest
import torch
from engine import engine
from model_set import Models
from reference import Comparison
from traffic import mixed, play

FLAGS: dict[str, dict[str, Any]] = {
    "fp8": {"kv_cache_dtype": "fp8_e4m3"},
    "pages of 64": {"page_size": 64},
    "stream-interval": {"stream_interval": 50},
    "recv-interval": {"scheduler_recv_interval": 30},
    "lpm": {"schedule_policy": "lpm"},
    "together": {
        "page_size": 64,
        "chunked_prefill_size": 64,
        "enable_priority_scheduling": True,
        "stream_interval": 50,
        "scheduler_recv_interval": 30,
        "schedule_policy": "lpm",
    },
}


@pytest.mark.parametrize("name", FLAGS)
def test_text_is_plain_decodings(models: Models, name: str) -> None:
    arrivals = mixed(seed=46, count=10, shared=70, aborts=0.0, stops=0.2)
    with engine(models.target, **FLAGS[name]) as e:
        expected = play(e, arrivals)
    with engine(models.target, whiflash=models.whiflash("random"), **FLAGS[name]) as e:
        found = play(e, arrivals)
        pool = e.scheduler.token_to_kv_pool_allocator.get_kvcache()
        assert (pool.dtype == torch.float8_e4m3fn) is (name == "fp8")
    comparison = Comparison(models.reference.target)
    for a in arrivals:
        comparison.check(a.prompt, expected[a.rid], found[a.rid], f"{name}, {a.rid}")
