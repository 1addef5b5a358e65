"""Published figures of cards, and how far the simulator's prices are from them. Imports no torch."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from whiflash_sglang.lab.simulate import H100, chance, cut, expected, row_seconds

BATCHES = (4, 8, 16, 32, 64)
SHARES = (0.25, 0.5, 0.75, 1.0)
H20_VERIFICATIONS = (
    (8.2, 8.7, 9.7, 10.9),
    (10.6, 12.8, 16.3, 19.6),
    (16.0, 22.7, 29.8, 35.8),
    (29.8, 43.1, 56.6, 70.1),
    (55.2, 82.2, 107.9, 133.9),
)
"""ms by batch and share of 15 drafts that is kept: Qwen3-8B bf16, H20 (AngelSlim, docs/source/_extra/dcut.html)."""
H20_RATES = {
    "plain": (526, 959, 1691, 2700, 3594),
    "EAGLE-3": (895, 1575, 2321, 2722, 3007),
    "DFlash-16": (1071, 1230, 1351, 1416, 1498),
    "D-Cut-16": (1273, 1853, 2377, 2666, 2910),
    "D-Cut-8": (1231, 1961, 2686, 3049, 3321),
}
"""Tokens a second by batch, of the same page."""
H100_ROUNDS = (
    (4, 2, 4, 7.62),
    (4, 2, 16, 8.86),
    (4, 4, 8, 9.78),
    (4, 4, 16, 9.86),
    (4, 4, 32, 10.67),
    (4, 8, 16, 12.20),
    (1, 4, 16, 8.95),
    (2, 4, 16, 9.57),
    (8, 4, 16, 10.94),
)
"""Requests, steps, rows a request, ms: EAGLE-3, Qwen3-8B FP8, SGLang 0.5.3.post3 (gpustack, h100-latency.md)."""
MT_BENCH, BLOCK_MS = 3.16, 1.25
"""DFlash's published length on MT-Bench; its block, fitted to its rates with that length."""
EAGLE_LENGTH, EAGLE_STEP_MS, EAGLE_DRAFTS = 2.4, 0.55, 3
"""The length is fitted to EAGLE-3's own rates: the page does not give its settings."""


class Check(NamedTuple):
    """One published table against ours. fitted: whether the table itself set a price.

    mean, worst: relative errors of its cells.
    """

    name: str
    fitted: str
    cells: int
    mean: float
    worst: float


def _fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Least squares of relative errors."""
    matrix, found = np.array(terms, dtype=np.float64), np.array(values, dtype=np.float64)
    fitted: list[float] = np.linalg.lstsq(matrix / found[:, None], np.ones(len(found)), rcond=None)[
        0
    ].tolist()
    return fitted


def _check(name: str, fitted: str, ours: Sequence[float], published: Sequence[float]) -> Check:
    errors = [abs(a / b - 1) for a, b in zip(ours, published, strict=True)]
    return Check(name, fitted, len(errors), sum(errors) / len(errors), max(errors))


def _h20_verify(batch: int, rows: float) -> float:
    """ms, between the published sizes; as many rows as a quarter of the drafts, or fewer, follow the first slope."""
    at = [batch * (1 + 15 * share) for share in SHARES]
    prices = H20_VERIFICATIONS[BATCHES.index(batch)]
    slope = (prices[1] - prices[0]) / (at[1] - at[0])
    return float(np.interp(rows, at, prices)) if rows > at[0] else prices[0] - slope * (at[0] - rows)


def _cut_ms(batch: int, rows: float) -> float:
    return _h20_verify(batch, rows) + BLOCK_MS


def _h20_rates() -> dict[str, list[float]]:
    """Tokens a second by batch."""
    terms = [[1.0, float(batch)] for batch in BATCHES]
    line = _fit(terms, [1000 * b / rate for b, rate in zip(BATCHES, H20_RATES["plain"], strict=True)])
    each = chance(MT_BENCH, 15)
    rates: dict[str, list[float]] = {name: [] for name in H20_RATES}
    for batch in BATCHES:
        rates["plain"].append(1000 * batch / float(line[0] + line[1] * batch))
        chain = _h20_verify(batch, batch * (EAGLE_DRAFTS + 1)) + EAGLE_DRAFTS * EAGLE_STEP_MS
        rates["EAGLE-3"].append(1000 * batch * EAGLE_LENGTH / chain)
        rates["DFlash-16"].append(1000 * batch * MT_BENCH / (_h20_verify(batch, 16 * batch) + BLOCK_MS))
        for name, most in (("D-Cut-16", 15), ("D-Cut-8", 7)):
            drafts = cut([each] * batch, most, partial(_cut_ms, batch))
            tokens = sum(expected(each, kept) for kept in drafts)
            rates[name].append(1000 * tokens / (_h20_verify(batch, batch + sum(drafts)) + BLOCK_MS))
    return rates


def checks() -> list[Check]:
    """Every published table that the prices rest on, or are tried on."""
    cells = [
        (batch, share, ms)
        for batch, line in zip(BATCHES, H20_VERIFICATIONS, strict=True)
        for share, ms in zip(SHARES, line, strict=True)
    ]
    plane = [[1.0, float(batch), batch * (1 + 15 * share)] for batch, share, _ in cells]
    coefficients = _fit(plane, [ms for *_, ms in cells])
    found = [
        _check(
            "H20 verifications",
            "three prices",
            [float(np.dot(coefficients, line)) for line in plane],
            [ms for *_, ms in cells],
        )
    ]
    rates = _h20_rates()
    how = {
        "plain": "two prices",
        "EAGLE-3": "its length",
        "DFlash-16": "the block",
        "D-Cut-16": "nothing",
        "D-Cut-8": "nothing",
    }
    found += [_check(f"H20 {name}", how[name], rates[name], H20_RATES[name]) for name in rates]
    terms = [[1.0, float(n), float(steps), float(n * rows)] for n, steps, rows, _ in H100_ROUNDS]
    linear = _fit(terms, [ms for *_, ms in H100_ROUNDS])
    ours = [float(np.dot(linear, line)) for line in terms]
    found.append(_check("H100 FP8 EAGLE-3 rounds", "four prices", ours, [ms for *_, ms in H100_ROUNDS]))
    found.append(
        _check(
            "a row at the peak: H20, H100 FP8",
            "nothing",
            [1000 * row_seconds(148e12), 1000 * row_seconds(1979e12)],
            [0.1095, (10.67 - 9.78) / 96],
        )
    )
    request = 0.15 + 16 * 1000 * row_seconds(2250e12)
    seconds = 1000 * (H100.fixed + H100.block) + 32 * request
    found.append(
        _check("B200 DFlash, 32 requests (sglang#20547)", "nothing", [32_000 * 6.35 / seconds], [12360])
    )
    plain = 1000 / 88
    a800 = plain + 1000 * H100.block + 15 * 1000 * row_seconds(312e12)
    found.append(_check("A800 DFlash, 1 request (sglang#29244)", "nothing", [2800 / a800], [162]))
    return found
