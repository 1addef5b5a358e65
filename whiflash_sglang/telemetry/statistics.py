"""Compute percentiles and paired bootstrap intervals of measurements."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

DRAWS = 2000
Floats = npt.NDArray[np.float64]


class Percentiles(BaseModel, frozen=True, extra="forbid"):
    """Percentiles of a latency, in milliseconds."""

    p50: float
    p95: float
    p99: float


class Interval(BaseModel, frozen=True, extra="forbid"):
    """A ratio with its confidence interval, 95 % unless the function that makes it says otherwise."""

    ratio: float
    low: float
    high: float


def percentiles_ms(seconds: Sequence[float]) -> Percentiles | None:
    """Return the 50th, 95th and 99th percentile of `seconds`, in milliseconds; None for an empty sequence."""
    if not seconds:
        return None
    p50, p95, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 95, 99])
    return Percentiles(p50=float(p50), p95=float(p95), p99=float(p99))


def rate(tokens: Floats, seconds: Floats) -> float:
    """Return tokens per second. tokens, seconds: [prompts, repetitions], of which each prompt's medians are summed."""
    return float(np.median(tokens, axis=1).sum() / np.median(seconds, axis=1).sum())


def paired_ratio(
    tokens: Floats,
    seconds: Floats,
    other_tokens: Floats,
    other_seconds: Floats,
    strata: Sequence[Any],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval:
    """Return the ratio of two arms' rates (`rate`) with its 95 % paired bootstrap interval.

    Both arms use the same draws: first prompts within their stratum (category; from all prompts if a stratum has only
    one), then repetitions of each drawn prompt. So an effect of a prompt or a moment on both arms cancels out.

    Args:
        tokens, seconds: [prompts, repetitions] of the arm; other_*: of the other arm, in the same order.
        strata: [prompts], the category of each.

    Raises:
        ValueError: the shapes differ or are empty.
    """
    if not (tokens.shape == seconds.shape == other_tokens.shape == other_seconds.shape) or not tokens.size:
        raise ValueError(f"paired samples need one shape, got {tokens.shape} and {other_tokens.shape}")
    generator = np.random.default_rng(seed)
    prompts, repetitions = tokens.shape
    labels = np.asarray([str(s) for s in strata])
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if min(map(len, members)) == 1:
        members = [np.arange(prompts)]  # A single prompt, always drawn, would make its category certain.
    rows = np.concatenate([generator.choice(m, size=(draws, len(m))) for m in members], axis=1)
    columns = generator.integers(0, repetitions, size=(draws, prompts, repetitions))

    def drawn(values: Floats) -> Floats:
        medians: Floats = np.median(values[rows[:, :, None], columns], axis=2)
        return np.asarray(medians.sum(axis=1), dtype=np.float64)

    ratios = (drawn(tokens) / drawn(seconds)) / (drawn(other_tokens) / drawn(other_seconds))
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = rate(tokens, seconds) / rate(other_tokens, other_seconds)
    return Interval(ratio=ratio, low=float(low), high=float(high))
