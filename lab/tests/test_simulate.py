"""The simulator of a card: published tables come out again before anything is predicted from them."""

import json
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from typer.testing import CliRunner

from whiflash_lab.simulate import (
    DRAFTS,
    FIXED,
    H100,
    PAIR,
    Host,
    SimulatedLoad,
    Simulation,
    chance,
    row_seconds,
)
from whiflash_sglang.cli.app import app
from whiflash_sglang.drafts import arms

STATED = {
    "H20 verifications": 0.14,
    "H20 plain": 0.03,
    "H20 EAGLE-3": 0.11,
    "H20 DFlash-16": 0.03,
    "H20 D-Cut-16": 0.09,
    "H20 D-Cut-8": 0.09,
    "H100 FP8 EAGLE-3 rounds": 0.05,
    "a row at the peak: H20, H100 FP8": 0.12,
    "B200 DFlash, 32 requests (sglang#20547)": 0.05,
    "A800 DFlash, 1 request (sglang#29244)": 0.30,
}
"""Relative error of the worst cell of every published table, as `results/simulated.md` has it."""


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


def _fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Least squares of relative errors."""
    matrix, found = np.array(terms, dtype=np.float64), np.array(values, dtype=np.float64)
    fitted: list[float] = np.linalg.lstsq(matrix / found[:, None], np.ones(len(found)), rcond=None)[
        0
    ].tolist()
    return fitted


def _worst(ours: Sequence[float], published: Sequence[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(ours, published, strict=True))


def _h20_verify(batch: int, rows: float) -> float:
    """ms, between the published sizes; as many rows as a quarter of the drafts, or fewer, follow the first slope."""
    at = [batch * (1 + 15 * share) for share in SHARES]
    prices = H20_VERIFICATIONS[BATCHES.index(batch)]
    slope = (prices[1] - prices[0]) / (at[1] - at[0])
    return float(np.interp(rows, at, prices)) if rows > at[0] else prices[0] - slope * (at[0] - rows)


def cut(chances: Sequence[float], longest: int, price: Callable[[float], float]) -> list[int]:
    """Drafts of each request such that the batch has most expected tokens a second: the likeliest drafts first."""
    likeliest = sorted(
        ((chance ** (k + 1), i) for i, chance in enumerate(chances) for k in range(longest)), reverse=True
    )
    total, best, keep = float(len(chances)), len(chances) / price(len(chances)), 0
    for kept, (alive, _) in enumerate(likeliest, 1):
        total += alive
        rate = total / price(len(chances) + kept)
        if rate > best:
            best, keep = rate, kept
    drafts = [0] * len(chances)
    for _, index in likeliest[:keep]:
        drafts[index] += 1
    return drafts


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
            tokens = sum(each**place for kept in drafts for place in range(kept + 1))
            rates[name].append(1000 * tokens / (_h20_verify(batch, batch + sum(drafts)) + BLOCK_MS))
    return rates


def test_published_tables_come_out_within_what_is_stated() -> None:
    """Tables that prices are fitted to show how well the form fits; the others are tried."""
    plane, verified = [], []
    for batch, line in zip(BATCHES, H20_VERIFICATIONS, strict=True):
        plane += [[1.0, float(batch), batch * (1 + 15 * share)] for share in SHARES]
        verified += line
    rounds = [[1.0, float(n), float(steps), float(n * rows)] for n, steps, rows, _ in H100_ROUNDS]
    timed = [ms for *_, ms in H100_ROUNDS]
    peaks = [1000 * row_seconds(148e12), 1000 * row_seconds(1979e12)]
    b200 = 1000 * (H100.fixed + H100.block) + 32 * (0.15 + 16 * 1000 * row_seconds(2250e12))
    a800 = 1000 / 88 + 1000 * H100.block + 15 * 1000 * row_seconds(312e12)
    worst = {
        "H20 verifications": _worst(np.dot(plane, _fit(plane, verified)).tolist(), verified),
        **{f"H20 {name}": _worst(rates, H20_RATES[name]) for name, rates in _h20_rates().items()},
        "H100 FP8 EAGLE-3 rounds": _worst(np.dot(rounds, _fit(rounds, timed)).tolist(), timed),
        "a row at the peak: H20, H100 FP8": _worst(peaks, [0.1095, (10.67 - 9.78) / 96]),
        "B200 DFlash, 32 requests (sglang#20547)": _worst([32_000 * 6.35 / b200], [12360]),
        "A800 DFlash, 1 request (sglang#29244)": _worst([2800 / a800], [162]),
    }
    assert worst.keys() == STATED.keys()
    assert not {name: error for name, error in worst.items() if error > STATED[name]}


@pytest.mark.parametrize("length", [1.5, 3.16, 6.4])
def test_a_chance_gives_its_length(length: float) -> None:
    assert sum(chance(length, 15) ** place for place in range(16)) == pytest.approx(length)


def test_a_cut_keeps_the_likeliest_drafts_that_pay() -> None:
    assert cut([0.9, 0.3], 8, lambda rows: 1.0) == [8, 8]
    assert cut([0.9, 0.3], 8, lambda rows: rows) == [0, 0]
    likely, unlikely = cut([0.9, 0.3], 8, lambda rows: 10 + rows)
    assert likely > unlikely


@pytest.mark.parametrize("method", ["plain", "eagle3", "dflash"])
def test_a_closed_load_decodes_at_the_published_length(method: str) -> None:
    load = SimulatedLoad(4, total=40, prompt=1, answer=400)
    simulation = Simulation(H100, load, method)
    result = simulation.run()
    assert len(simulation.controller.states) == 3, "the load is steady to the end"
    rounds = sum(result.routed.values())
    assert set(result.routed) == {{"plain": arms.NONE, "eagle3": arms.AR, "dflash": arms.DIFFUSION}[method]}
    if method == "plain":
        assert rounds == result.tokens
        assert result.rate == pytest.approx(4 / H100.verify(4, 4 * 200), rel=0.1)
    else:
        assert 3 < result.tokens / rounds < DRAFTS[arms.DIFFUSION]


def test_the_controller_leaves_a_drafter_whose_drafts_are_refused() -> None:
    pair = PAIR._replace(lengths={"one": {arms.AR: 1.05, arms.DIFFUSION: 6.0}})
    routed = Simulation(H100, SimulatedLoad(4, total=40), "auto", pair=pair).run().routed
    assert routed[arms.DIFFUSION] > 0.9 * sum(routed.values())


def test_the_first_line_names_what_is_assumed() -> None:
    arguments = ["lab", "simulate", "--requests", "2", "--answer", "32"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("SIMULATED, nothing measured")
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert {one["method"] for one in found["tokens_per_second"]} == {"plain", "eagle3", "dflash", "auto"}


def test_a_slow_host_makes_rows_free_and_plain_decoding_no_faster() -> None:
    """Rounds last as long as the host: more drafts cost nothing, and the controller drafts."""
    load, host = SimulatedLoad(8, total=60), Host(0.03, 0.0)
    pair = PAIR._replace(lengths={"one": {arms.AR: 1.2, arms.DIFFUSION: 1.25}})
    simulation = Simulation(H100, load, "auto", pair=pair, host=host)
    rate = simulation.run().rate
    assert simulation.controller.worth(arms.DIFFUSION).row == pytest.approx(0.0, abs=1e-3)
    assert rate > 0.99 * Simulation(H100, load, "dflash", pair=pair, host=host).run().rate


def test_agents_gain_by_what_the_host_knows() -> None:
    load = SimulatedLoad(8, total=60, tools=1.0)
    simulation = Simulation(H100, load, "auto")
    fixed = max(Simulation(H100, load, method).run().rate for method in FIXED)
    assert simulation.run().rate > 1.2 * fixed
    assert simulation.result.routed[arms.STRUCTURE]


def test_a_wrong_number_of_requests_is_refused() -> None:
    from whiflash_sglang.errors import UsageError

    refused = CliRunner().invoke(app, ["lab", "simulate", "--requests", "1,many"])
    assert isinstance(refused.exception, UsageError)
