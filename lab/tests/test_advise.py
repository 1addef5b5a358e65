"""`whiflash advise` and `report`: assumptions come first, published ratios come out, a bad deal is called one."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from whiflash_lab.advise import ERROR, GPUS, Estimate, Question, _card, _far, advise
from whiflash_lab.published import KNOWN, Shape, known
from whiflash_lab.simulate import Card, PublishedPair, SimulatedLoad, Simulation
from whiflash_sglang.cli.app import app
from whiflash_sglang.cli.report import brought, by_caller, gain_of
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError, WhiflashError

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("target", [one.name for one in KNOWN])
def test_every_known_target_has_an_answer(target: str) -> None:
    found = advise(Question(target, requests=(4,), answer=64))
    assert found.assumed.startswith("ESTIMATE, nothing measured")
    (row,) = found.rows
    assert row.low <= row.ratio * 1.05
    assert row.high >= row.ratio * 0.95
    assert len(found.settings) >= 2


def test_the_page_that_decides_shows_todays_estimate() -> None:
    page = (Path(__file__).parents[2] / "docs" / "when-to-use.md").read_text("utf-8")
    found = advise(Question("Qwen3-8B", requests=(40,), tools=0.3))
    assert found.verdict in page
    assert all(f"{rate:,.0f}" in page for rate in found.rows[0].rates.values())
    (far,) = advise(Question("Qwen3-8B", "h200", requests=(1,), context=1 << 17)).rows
    assert (
        f"{far.rates['plain']:.0f} tokens a second of Qwen3-8B for one then, {far.rates['auto']:.0f} with"
        in page
    )


def ratio(
    target: str, lengths: dict[str, float], drafts: dict[str, int], method: str, requests: int
) -> float:
    """Tokens a second over plain, on one H100."""
    shape = known(target)
    assert shape is not None
    card, load = (_card(shape.shape, GPUS["h100"], 1), SimulatedLoad(requests, 2 * requests + 40, tools=1e-9))
    pair = PublishedPair({"published": lengths}, drafts, drafts)
    speculating, plain = (Simulation(card, load, name, pair=pair).run().rate for name in (method, "plain"))
    return speculating / plain


@pytest.mark.parametrize(
    ("target", "length", "drafts", "method", "requests", "published"),
    [
        ("Qwen3-8B", 2.33, 7, "dflash", 1, 1.77),
        ("Qwen3-8B", 2.33, 7, "dflash", 32, 1.29),
        ("gpt-oss-120b", 2.41, 3, "eagle3", 1, 1.34),
        ("gpt-oss-120b", 2.41, 3, "eagle3", 8, 1.31),
        ("gpt-oss-120b", 2.43, 3, "eagle3", 64, 1.44),
    ],
)
def test_ratios_that_others_measured_on_an_h100_come_out(
    target: str, length: float, drafts: int, method: str, requests: int, published: float
) -> None:
    arm = {"dflash": arms.DIFFUSION, "eagle3": arms.AR}[method]
    found = ratio(target, {arm: length}, {arm: drafts}, method, requests)
    assert found == pytest.approx(published, rel=ERROR)


def test_a_layer_reads_a_long_context_as_an_h200_did() -> None:
    record = json.loads((RESULTS / "gpu" / "verification.json").read_text())["runs"][0]
    for row in record["rows"]:
        requests, context, width = row["requests"], row["context"], row["width"]
        if width > 8 or context < 20_000:
            continue
        layer, question = (
            Shape(0, 0, 1, 4096),
            Question("a layer", record["card"].split()[1], context=context),
        )
        found = _far(Card("H200", *(0.0,) * 5), layer, question, requests)
        assert 1000 * found.verify(requests * width, requests * context) == pytest.approx(
            row["ours_ms"], rel=0.25
        )


def test_a_long_context_takes_time_and_memory() -> None:
    near, far = (advise(Question("Qwen3-8B", requests=(8,), answer=64, context=n)) for n in (0, 1 << 17))
    assert far.rows[0].rates["plain"] < 0.5 * near.rows[0].rates["plain"]
    assert far.rows[0].ratio > 1
    assert "131,072 cached" in far.assumed
    assert (near.obstacles, far.obstacles) == (
        [],
        ["155 GB of KV for 8 × 131,072 tokens fit only if requests share them"],
    )
    with pytest.raises(ConfigError, match="does not go with --url"):
        advise(Question("Qwen3-8B", context=1), STATE)


STATE: dict[str, Any] = {
    "tokens": 1000,
    "timed_seconds": 10.0,
    "plain_seconds": 15.0,
    "by_arm": {
        "ar": {"rounds": 200, "tokens": 900, "proposed": 1000, "accepted": 700},
        "none": {"rounds": 100, "tokens": 100, "proposed": 0, "accepted": 0},
    },
    "costs": {"verify": 0.02, "verify_draft": 0.0005, "verify_request": 0.002, "draft": {"ar": 0.003}},
}


def test_a_server_is_judged_by_its_own_prices() -> None:
    good = advise(Question("anything", requests=(1,), answer=64), STATE)
    assert good.verdict.startswith("Turn it on")
    assert "prices of the running server" in good.assumed
    poor = {**STATE, "by_arm": {"ar": {"rounds": 200, "tokens": 202, "proposed": 1000, "accepted": 2}}}
    poor["plain_seconds"] = 0.9 * STATE["timed_seconds"]
    assert advise(Question("anything", requests=(1, 8), answer=64), poor).verdict.startswith("Leave it off")
    with pytest.raises(ConfigError, match="fewer than 64 rounds"):
        advise(Question("anything"), {**STATE, "by_arm": {}})


def test_what_a_server_copies_counts_as_its_report_counts_it() -> None:
    """A pair that hardly drafts beside copies and forced text that pay."""
    one = {"rounds": 300, "tokens": 303, "proposed": 1000, "accepted": 3}
    copied = {"rounds": 200, "tokens": 900, "proposed": 1000, "accepted": 700}
    pair = {"ar": one, "diffusion": one}
    state = {**STATE, "plain_seconds": 13.4, "by_arm": {**pair, "lookup": copied, "structure": copied}}
    found = advise(Question("Qwen3-8B", requests=(1, 4), answer=64), state)
    assert found.verdict.startswith("Turn it on: 1.34 over plain decoding on the server's own traffic")
    assert "Leave it off" not in found.verdict
    assert all(row.ratio < 1.1 for row in found.rows)
    assert "Train" not in str(found.settings)
    assert "bundle create" not in str(found.settings)
    without = {**state, "by_arm": {"lookup": copied}}
    found = advise(Question("anything", requests=(1,)), without)
    assert found.verdict.startswith("Turn it on: 1.34")
    assert (found.rows, "Train" in str(found.settings)) == ([], True)


def test_a_stock_algorithm_that_is_ahead_is_named() -> None:
    rates = {"plain": 100.0, "eagle3": 190.0, "dflash": 240.0, "auto": 230.0}
    assert Estimate(40, rates, 1.0, 3.0).verdict == "Take SGLang's own block drafter"
    assert Estimate(40, {**rates, "dflash": 229.0}, 1.0, 3.0).verdict == "Turn it on"
    assert Estimate(40, {"plain": 100.0, "auto": 99.0}, 1.0, 1.0).verdict == "Leave it off"


def test_what_cannot_be_answered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nothing is known of it; name one of Qwen/Qwen3-4B"):
        advise(Question("owner/model"))
    with pytest.raises(ConfigError, match="--gpu h1000 is not one of"):
        advise(Question("Qwen3-8B", gpu="h1000"))
    monkeypatch.setitem(GPUS, "a100", GPUS["a100"]._replace(memory=40e9))
    (obstacle,) = advise(Question("gpt-oss-120b", gpu="a100", requests=(1,), answer=16)).obstacles
    assert "do not fit 1 × A100" in obstacle
    two = advise(Question("gpt-oss-120b", gpu="a100", cards=2, requests=(1,), answer=16))
    assert (two.obstacles, "--tp-size 2" in str(two.settings)) == ([], True)


def test_the_command_shows_and_prints_json() -> None:
    line = ["advise", "qwen3-8b", "--requests", "1", "--answer", "32", "--tools", "0.3", "--context", "128k"]
    shown = CliRunner().invoke(app, line)
    assert shown.stdout.startswith("ESTIMATE")
    assert "131,072 cached" in " ".join(shown.stdout.split())
    assert "simulating loads" in shown.stderr
    for title in ("Over plain, as others measured:", "Drafters:", "Set:", "You give up:"):
        assert title in shown.output
    found = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert found["rows"][0]["ratio"] > 1
    for wrong in (["--requests", "1,many"], ["--context", "128 kB"]):
        assert isinstance(CliRunner().invoke(app, ["advise", "qwen3-8b", *wrong]).exception, WhiflashError)


def test_a_report_compares_with_the_servers_prices_and_counts_from_an_earlier_one() -> None:
    whole = brought(STATE).as_json(hourly=3.6)
    assert (whole["gain"], whole["tokens_per_second"]) == (1.5, 100.0)
    assert whole["cost_per_million_tokens"] == pytest.approx(10.0)
    assert whole["saved_cost"] == pytest.approx(0.005)
    later = {**STATE, "tokens": 1500, "timed_seconds": 20.0, "plain_seconds": 20.0}
    assert brought(later, STATE).as_json(None)["gain"] == 0.5
    with pytest.raises(ConfigError, match="was restarted"):
        brought(STATE, later)
    with pytest.raises(ConfigError, match="no round yet"):
        brought({"tokens": 0})
    with pytest.raises(ConfigError, match="no round yet"):
        brought({**later, "tokens": STATE["tokens"]}, STATE).as_json(hourly=1.0)


def test_an_earlier_report_that_is_none_is_named(tmp_path: Path) -> None:
    for state in ('{"tokens": "many"}', '{"tokens": 1e300}', "[]", "{}"):
        (tmp_path / "monday.json").write_text(f'{{"http://127.0.0.1:1": {{"state": {state}}}}}')
        ended = CliRunner().invoke(app, ["report", "--since", str(tmp_path / "monday.json")])
        assert isinstance(ended.exception, WhiflashError), state


def test_agents_and_tenants_are_reported_from_sampled_traces(tmp_path: Path) -> None:
    def sample(agent: str | None, tenant: str | None, tokens: int, saved: float) -> str:
        arms = {"ar": {"rounds": 4, "tokens": tokens, "proposed": 9, "accepted": 3, "saved": saved}}
        sums = {"version": 1, "policy": "auto", "rounds": 4, "tokens": tokens, "seconds": 2.0, "arms": arms}
        return json.dumps({"agent": agent, "tenant": tenant, "sglext": {"whiflash": sums}})

    with pytest.raises(ConfigError, match="has no sampled traces: start the server with"):
        by_caller(tmp_path)
    coder = [sample("coder", "aa", 20, 1.0), sample("coder", "bb", 12, -1.0)]
    (tmp_path / "traces.1.jsonl").write_text("\n".join(coder))
    (tmp_path / "traces.jsonl").write_text(sample(None, "bb", 8, 3.0) + '\n{"torn')
    found = by_caller(tmp_path).shares
    assert [(one.name, one.answers, one.tokens, gain_of(one)) for one in found["agent"]] == [
        ("coder", 2, 32, 1.0),
        ("none named", 1, 8, 2.5),
    ]
    assert [(one.name, one.tokens) for one in found["tenant"]] == [("aa", 20), ("bb", 20)]
    shown = CliRunner().invoke(app, ["report", "--traces", str(tmp_path)])
    assert "coder" in shown.output
    as_json = json.loads(CliRunner().invoke(app, ["report", "--traces", str(tmp_path), "--json"]).output)
    assert as_json["tenant"][1]["answers"] == 2
