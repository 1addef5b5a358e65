"""Passes of an engine, timed one by one on the host's clock."""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

from whiflash_sglang.prices.round_clock import STAGES


def paced(e: Any, ask: Callable[[], int], requests: int) -> dict[str, Any]:
    """Run `ask`, which asks requests that begin together, and return figures of its passes.

    Tokens a second of all passes and without the slowest one, the median pass and every one, in milliseconds. Our
    rounds have the host's time to issue one, too, whole and by stage, and rows.

    ask: returns the tokens of all answers.
    """
    passes, step, clock = list[float](), e.step, getattr(e.worker, "clock", None)

    def counted() -> bool:
        began = time.perf_counter()
        if ran := bool(step()):
            passes.append(time.perf_counter() - began)
        return ran

    gc.collect()
    gc.freeze()  # as a server does; else one of the arms pays for a full collection, which takes a second
    before, began = clock.snapshot() if clock else {}, time.perf_counter()
    with patch.object(e, "step", counted):
        tokens = ask()
    seconds, usual = time.perf_counter() - began, median(passes)
    figures = {
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_without_slowest": tokens / (seconds - max(passes) + usual),
        "ms_per_pass": 1e3 * seconds / len(passes),
        "median_ms": 1e3 * usual,
        "most_ms": 1e3 * max(passes),
        "tokens_per_pass": tokens / len(passes) / requests,
        "ms_of_passes": [round(1e3 * each, 2) for each in passes],
    }
    if clock:
        spent = {name: value - before[name] for name, value in clock.snapshot().items()}
        rounds = max(spent["rounds"], 1)
        figures["host_ms_per_round"] = 1e3 * spent["round_seconds"] / rounds
        figures["host_ms_by_stage"] = {name: 1e3 * spent[f"{name}_seconds"] / rounds for name in STAGES}
        figures["rows_per_round"] = spent["rows"] / rounds
    return figures


def twice(e: Any, ask: Callable[[], int], requests: int) -> dict[str, Any]:
    """Run `ask` to cache its prompts, and twice more. Return figures of the last run, with two of both timed runs: the
    median pass and the rate without the slowest one.
    """
    ask()
    runs = [paced(e, ask, requests) for _ in range(2)]
    both = {f"both_{name}": [run[name] for run in runs] for name in ("median_ms", "tokens_per_s_without_slowest")}
    return {**runs[-1], **both}
