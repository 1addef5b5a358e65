"""A server that looks its prices up has them before its first request, and routes by them.

On a GPU events time what is captured; here the host's clock times the same buckets, eagerly. No time is asserted.
"""

from pathlib import Path
from typing import Any

import pytest
from engine import engine
from model_set import Models
from reference import Comparison

from whiflash_sglang.engine.scheduler import pricing
from whiflash_sglang.prices.tables import LookedUpCosts

SMALL: dict[str, Any] = {"max_running_requests": 2, "context_length": 96, "max_total_tokens": 512}
PROMPTS = [[1, 2, 3, 4] * 4, [7] * 9]


def test_a_server_is_priced_before_its_first_request_and_routes_by_it(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with engine(models.target, **SMALL) as e:
        plain = e.generate(PROMPTS, max_new_tokens=24)
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    monkeypatch.setenv("WHIFLASH_CACHE", str(tmp_path))
    monkeypatch.setattr(pricing, "costs_of", lambda device, width, overlaps: LookedUpCosts(width, overlaps))
    with engine(models.target, whiflash=models.whiflash("auto"), **SMALL) as e:
        costs = e.worker.controller.costs
        assert isinstance(costs, LookedUpCosts)
        sizes = costs.tables.verifications.at_long.sizes
        assert (sizes[:8], sizes[-1]) == ((1, 2, 3, 4, 6, 8, 12, 16), 34), "every size that a round may have"
        found = e.generate(PROMPTS, max_new_tokens=24)
        assert e.worker.clock.rounds > 5
        assert costs.correction.factor != 1.0, "rounds were compared with the tables"
        comparison = Comparison(models.reference.target)
        for i, prompt in enumerate(PROMPTS):
            comparison.check(prompt, plain[i], found[i], str(i))
        state = e.worker.snapshot()["costs"]
        assert set(state["draft"]) == set(e.worker.drafters)
        assert state["verify"] > 0 < state["draft"]["ar"]
