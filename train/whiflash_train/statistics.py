"""Percentiles and paired bootstrap intervals. Needs no server."""

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
    """A ratio and its interval, of 95 % unless its maker says otherwise."""

    ratio: float
    low: float
    high: float


def percentiles_ms(seconds: Sequence[float]) -> Percentiles | None:
    """Percentiles of `seconds` in milliseconds; None without any."""
    if not seconds:
        return None
    p50, p95, p99 = np.percentile(np.asarray(seconds) * 1000, [50, 95, 99])
    return Percentiles(p50=float(p50), p95=float(p95), p99=float(p99))


def rate(tokens: Floats, seconds: Floats) -> float:
    """Tokens per second. tokens, seconds: [prompts, repetitions]; the median repetition of every prompt counts."""
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
    """Ratio of two arms' rates with its 95 % paired bootstrap interval.

    Both arms are drawn together, first prompts within their stratum (category; from all where a stratum has but
    one), then repetitions of each drawn prompt: what a prompt or a moment did to both arms cancels out.

    Args:
        tokens, seconds: [prompts, repetitions] of the arm; other_*: of the one it is compared with, same order.
        strata: [prompts].

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
        members = [np.arange(prompts)]  # Drawing one prompt of one would call its category certain.
    rows = np.concatenate([generator.choice(m, size=(draws, len(m))) for m in members], axis=1)
    columns = generator.integers(0, repetitions, size=(draws, prompts, repetitions))

    def drawn(values: Floats) -> Floats:
        medians: Floats = np.median(values[rows[:, :, None], columns], axis=2)
        return np.asarray(medians.sum(axis=1), dtype=np.float64)

    ratios = (drawn(tokens) / drawn(seconds)) / (drawn(other_tokens) / drawn(other_seconds))
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = rate(tokens, seconds) / rate(other_tokens, other_seconds)
    return Interval(ratio=ratio, low=float(low), high=float(high))
