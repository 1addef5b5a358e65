"""The simulator of a card: published figures come out again before anything is predicted from them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from whiflash_lab import chains
from whiflash_lab.cards import DRAFTS, H100, ROW
from whiflash_lab.simulate import FIXED, PAIR, Host, SimulatedLoad, Simulation
from whiflash_sglang.cli.app import app
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.rates import continuing
from whiflash_sglang.errors import UsageError

FIGURES = Path(__file__).parents[2] / "results/gpu/shaped.json"


def test_published_figures_come_out_within_what_is_stated() -> None:
    """Relative errors, as `results/simulated.md` has them, of figures that set no price here."""
    b200 = 1000 * (H100.fixed + H100.block) + 32 * (0.15 + 16 * 1000 * ROW / 2250e12)
    a800 = 1000 / 88 + 1000 * H100.block + 15 * 1000 * ROW / 312e12
    for ours, published, error in (
        (1000 * ROW / 148e12, 0.1095, 0.12),  # ms a row at an H20's peak (AngelSlim, dcut.html)
        # An H100's in FP8: 4 requests with 32 rows and with 8 (gpustack, h100-latency.md).
        (1000 * ROW / 1979e12, (10.67 - 9.78) / 96, 0.12),
        (32_000 * 6.35 / b200, 12360, 0.05),  # B200, DFlash, 32 requests (sglang#20547)
        (2800 / a800, 162, 0.30),  # A800, DFlash, 1 request (sglang#29244)
    ):
        assert ours == pytest.approx(published, rel=error)


@pytest.mark.parametrize("length", [1.5, 3.16, 6.4])
def test_a_chance_gives_its_length(length: float) -> None:
    assert sum(continuing(length, 16) ** place for place in range(16)) == pytest.approx(length)


@pytest.mark.parametrize("method", ["plain", "eagle3", "dflash"])
def test_a_closed_load_decodes_at_the_published_length(method: str) -> None:
    simulation = Simulation(H100, SimulatedLoad(4, total=40, prompt=1, answer=400), method)
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
    for words in ([*arguments, "--figures", str(FIGURES)], ["lab", "simulate", "--figures", __file__]):
        assert isinstance(CliRunner().invoke(app, words).exception, UsageError)


def test_a_slow_host_makes_rows_free_and_plain_decoding_no_faster() -> None:
    """Rounds last as long as the host: more drafts cost nothing, and the controller drafts."""
    load, host = SimulatedLoad(8, total=60), Host(0.03, 0.0)
    pair = PAIR._replace(lengths={"one": {arms.AR: 1.2, arms.DIFFUSION: 1.25}})
    simulation = Simulation(H100, load, "auto", pair=pair, host=host)
    rate = simulation.run().rate
    assert simulation.controller.worth().row == pytest.approx(0.0, abs=1e-3)
    assert rate > 0.99 * Simulation(H100, load, "dflash", pair=pair, host=host).run().rate


def test_agents_gain_by_what_the_host_knows() -> None:
    load = SimulatedLoad(8, total=60, tools=1.0)
    simulation = Simulation(H100, load, "auto")
    assert simulation.run().rate > 1.2 * max(Simulation(H100, load, method).run().rate for method in FIXED)
    assert simulation.result.routed[arms.STRUCTURE]


def test_a_fitted_card_is_compared_with_chains_and_stock_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LENGTHS", (1.05, 3.0)), ("STEADY", (150, 300)), ("STARTS", 1)):
        monkeypatch.setattr(chains, name, value)
    shown = CliRunner().invoke(app, ["lab", "simulate", "--figures", str(FIGURES), "--requests", "16"])
    assert shown.exit_code == 0, shown.output
    rows = [line.strip("|").split("|") for line in shown.output.splitlines() if line.startswith(("| 1.05", "| 3 "))]
    assert [len(row) for row in rows] == [12, 12, 5, 5]
    for row in rows[:2]:
        stock, ours, *_, best = (float(cell.replace(",", "")) for cell in row[2:10])
        assert stock > ours
        assert best > 0.97, "a chain of three is the best of 16 requests, plain decoding where nothing is accepted"
