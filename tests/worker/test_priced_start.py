"""A server that looks its prices up has them before its first request, and routes by them.

On a GPU events time what is captured; here the host's clock times a few sizes, eagerly. No time is asserted.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from engine import engine
from model_set import Models
from reference import Comparison
from sglang.srt.configs.model_config import AttentionArch

from whiflash_sglang.engine.scheduler import pricing
from whiflash_sglang.prices.tables import Verifications

SMALL: dict[str, Any] = {"max_running_requests": 2, "context_length": 96, "max_total_tokens": 512}
PROMPTS = [[1, 2, 3, 4] * 4, [7] * 9]


def test_a_server_is_priced_before_its_first_request_and_routes_by_it(models: Models) -> None:
    with engine(models.target, **SMALL) as e:
        plain = e.generate(PROMPTS, max_new_tokens=24)
    with engine(models.target, whiflash=models.whiflash("auto"), **SMALL) as e:
        costs = e.worker.controller.costs
        sizes = costs.tables.verifications.at_long.sizes
        assert sizes == (1, 2, 4, 8, 16, 32, 34)
        found = e.generate(PROMPTS, max_new_tokens=24)
        assert e.worker.clock.rounds > 5
        assert costs.correction.factor != 1.0, "rounds were compared with the tables"
        comparison = Comparison(models.reference.target)
        for i, prompt in enumerate(PROMPTS):
            comparison.check(prompt, plain[i], found[i], str(i))
        state = e.worker.snapshot()["costs"]
        assert set(state["draft"]) == set(e.worker.drafters)
        assert state["verify"] > 0 < state["draft"]["ar"]


def timed(
    admits: int, arch: AttentionArch = AttentionArch.MHA, slots: int = 400_000, graphs: object = "some"
) -> tuple[int, int]:
    """Contexts that a server times which admits so many tokens, with a row that is verified behind them."""
    runner = SimpleNamespace(model_config=SimpleNamespace(attention_arch=arch))
    target = SimpleNamespace(context_len=admits + 1, kv_slots=slots, runner=runner)
    start: Any = SimpleNamespace(target=target, _widest=1, _graphs=graphs)
    return pricing.Start._contexts(start)


def test_contexts_are_timed_where_a_cut_prefix_is_flat_and_where_it_rises() -> None:
    """On an H200 it is flat up to 8,448 tokens, and then takes 0.064 ms more for each 1,024 (36 layers)."""

    def seconds(_: int, context: int) -> float:
        return 6.9e-3 + 6.25e-8 * max(context - 8448, 0)

    for admits in (131072, 40960, 32768):
        prices = Verifications.measured(*timed(admits), [1], seconds)
        for context in (100, 1024, 8192, 16384, admits, 4 * admits):
            assert prices.at(1, context) == pytest.approx(seconds(1, context), rel=0.01)
    assert [timed(131072, slots=20_000), timed(4096)] == [(8192, 20_000), (256, 4096)]
    assert timed(131072, AttentionArch.MLA) == (1024, 16384)
    assert timed(131072, graphs=None) == (256, 4096)
