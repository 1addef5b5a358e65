"""`whiflash advise` and `report`: assumptions come first, published ratios come out, a bad deal is called one."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from priced import priced
from typer.testing import CliRunner

from whiflash_lab.advise import GPUS, OURS, PLAIN, Estimate, Question, _card, advise
from whiflash_lab.published import FACTS, KNOWN, PublishedTarget, Ratio, Shape
from whiflash_lab.simulate import PublishedPair, SimulatedLoad, Simulation
from whiflash_sglang.cli.app import app
from whiflash_sglang.cli.report import brought
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError, UsageError
from whiflash_sglang.prices.costs import PLAIN_ROUNDS

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("target", [f"models/{one.name}/" for one in KNOWN])
def test_every_known_target_has_an_answer(target: str) -> None:
    found = advise(Question(target, requests=(4,), answer=64))
    assert found.assumed.startswith("ESTIMATE, nothing measured")
    (row,) = found.rows
    assert row.low <= row.rates[OURS] / row.rates[PLAIN] * 1.05
    assert row.high >= row.rates[OURS] / row.rates[PLAIN] * 0.95
    assert {*row.rates} >= {PLAIN, "NGRAM", OURS}
    assert len(found.settings) >= 2


def test_the_page_that_decides_shows_todays_estimate() -> None:
    page = (Path(__file__).parents[2] / "docs" / "when-to-use.md").read_text("utf-8")
    found = advise(Question("Qwen3-8B", requests=(40,), tools=0.3))
    assert found.verdict in page
    assert all(f"{rate:,.0f}" in page for rate in found.rows[0].rates.values())
    (far,) = advise(Question("Qwen3-8B", "h200", requests=(1,), context=1 << 17)).rows
    assert (
        f"{far.rates[PLAIN]:.0f} tokens a second of Qwen3-8B for one, {far.rates['DSPARK']:.0f} with DSPARK and\n"
        f"{far.rates[OURS]:.0f} with WHIFLASH" in page
    )


REPEATED = [(target, ratio) for target in KNOWN for ratio in target.ratios if ratio.estimated]


@pytest.mark.parametrize(("target", "ratio"), REPEATED, ids=[ratio.what for _, ratio in REPEATED])
def test_what_others_measured_comes_out_as_it_is_said_to(target: PublishedTarget, ratio: Ratio) -> None:
    """Rates of plain decoding within 11 %, ratios within 55 %."""
    assert ratio.using is not None
    gpu, arm, length, drafts, prompt = ratio.using
    pair = PublishedPair({"published": {arm: length}}, {arm: drafts}, {arm: drafts})

    def rate(requests: int, method: str) -> float:
        load = SimulatedLoad(requests, 2 * requests + 40, prompt, tools=1e-9)
        card = _card(target.shape, GPUS[gpu], 1, requests=requests)
        return Simulation(card, load, method, pair=pair).run().rate

    for requests, published in ratio.by_requests.items():
        found = rate(requests, {arms.DIFFUSION: "dflash", arms.AR: "eagle3", arms.NONE: "plain"}[arm])
        if arm != arms.NONE:
            found /= rate(requests, "plain")
        assert found == pytest.approx(float(published), rel=0.11 if arm == arms.NONE else 0.55)
        assert ratio.estimated[requests] == pytest.approx(found, rel=0.005), requests


def test_copies_are_counted_as_in_their_reports() -> None:
    figures = partial(re.findall, r"\d\.\d\d")
    for line in FACTS.copies:
        (name,) = re.findall(r"\((results/[\w/-]+\.md)\)", line)
        assert set(figures(line)) <= set(figures((RESULTS.parent / name).read_text("utf-8")))


def test_a_layer_reads_a_long_context_as_an_h200_did() -> None:
    record = json.loads((RESULTS / "gpu" / "verification.json").read_text())["runs"][0]
    for row in record["rows"]:
        requests, context, width = row["requests"], row["context"], row["width"]
        if width > 8 or context < 20_000:
            continue
        card = _card(Shape(0, 0, 1, 4096), GPUS[record["card"].split()[1].lower()], 1, context, requests)
        found = card.verify(requests * width, requests * context) - card.fixed
        assert 1000 * found == pytest.approx(row["ours_ms"], rel=0.25)


def test_a_long_context_takes_time_and_memory() -> None:
    near, far = (advise(Question("Qwen3-8B", requests=(8,), answer=64, context=n)) for n in (0, 1 << 17))
    assert far.rows[0].rates["plain"] < 0.5 * near.rows[0].rates["plain"]
    assert far.rows[0].rates[OURS] > far.rows[0].rates[PLAIN]
    assert "4.25 of EAGLE3 and 5.27 of DSPARK tokens a round" in far.assumed
    assert "131,072 cached" in far.assumed
    (full,) = near.obstacles + far.obstacles
    assert full.startswith("KV for 8 × 131,648 tokens takes 155 GB: 2 requests fit, 2 beside a block drafter")
    assert ("needs YaRN" in near.assumed, "beyond 40,960 positions" in far.assumed) == (False, True)
    with pytest.raises(ConfigError, match="remove --context: with --url"):
        advise(Question("Qwen3-8B", context=1), STATE)


def test_an_agent_that_returns_to_a_full_cache_pays() -> None:
    question = Question("Qwen3-8B", requests=(8, 64), answer=64, context=1 << 15)
    found = advise(question)
    few, many = found.rows
    assert not few.returning, "all fit"
    nothing, host, again = many.returning
    assert nothing.rates[OURS] == pytest.approx(few.rates[OURS], rel=0.001), "those that have room run"
    assert nothing.rates[PLAIN] > few.rates[PLAIN]
    assert host.rates == many.rates, "the flags for host memory are set"
    slot = 147456 * (1 + 6 / 36)
    assert host.seconds == pytest.approx((1 << 15) * slot / 50e9)
    assert 0.8 < again.seconds < 0.95, "attention included; jobs of others measure about a second"
    for each in many.returning:
        alone = 64 / nothing.rates[OURS]
        assert each.rates[OURS] == pytest.approx(64 / (alone + each.seconds))
    assert again.rates[OURS] / again.rates[PLAIN] < 0.6 * nothing.rates[OURS] / nothing.rates[PLAIN]
    assert f"{again.rates[many.choice]:,.0f} tokens a second" in found.verdict
    served = next(line for line in found.settings if line.startswith("whiflash serve"))
    size = -int(-64 * ((1 << 15) + 512 + 64) * slot // 1e9)
    assert f"--enable-session-radix-cache --enable-hierarchical-cache --hicache-size {size}" in served
    (narrow,) = (line for line in found.settings if line.startswith("--kv-cache-dtype"))
    plain, ours = map(int, re.findall(r"(\d+) (?:agents|beside)", narrow))
    (full,) = found.obstacles
    assert full.startswith("KV for 64 × 33,344 tokens takes 315 GB")
    before = list(map(int, re.findall(r"(\d+) requests fit|(\d+) beside two", full)[0][:1]))
    assert plain >= 2 * before[0] > 0
    assert ours < plain
    assert not advise(question._replace(context=0)).rows[1].returning
    assert "--hicache-size" not in str(advise(question._replace(context=0)).settings)


COSTS = priced(lambda arm: 4, {"ar": 0.003}, base=0.0195, row=0.0005)
STATE: dict[str, Any] = {
    "tokens": 1000,
    "timed_seconds": 10.0,
    "timed_tokens": 1000,
    "priced_seconds": 10.0,
    "priced_tokens": 1000,
    "plain_seconds": 15.0,
    "plain_price": COSTS.plain_price() | {"rounds": PLAIN_ROUNDS},
    "by_arm": {
        "ar": {"rounds": 200, "tokens": 900, "proposed": 1000, "accepted": 700},
        "diffusion": {"rounds": 40, "tokens": 80, "proposed": 200, "accepted": 40},
        "none": {"rounds": 100, "tokens": 100, "proposed": 0, "accepted": 0},
    },
    "costs": COSTS.snapshot(["ar"]),
}


def test_a_server_is_judged_by_its_own_prices() -> None:
    good = advise(Question("anything", requests=(1,), answer=64), STATE)
    assert good.verdict == "Take WHIFLASH for its own traffic: 100 tokens a second, 1.50 of plain's 67."
    assert "prices of the running server" in good.assumed
    dear = {**STATE, "costs": {**STATE["costs"], "verify_row": 0.01}}
    assert advise(Question("anything", requests=(1,), answer=64), dear).rows != good.rows
    assert "without diffusion: fewer than 64 rounds" in good.assumed
    assert "DFLASH" not in good.rows[1].rates
    poor = {**STATE, "by_arm": {"ar": {"rounds": 200, "tokens": 202, "proposed": 1000, "accepted": 2}}}
    poor["plain_seconds"] = 0.9 * STATE["timed_seconds"]
    assert advise(Question("anything", requests=(1, 8), answer=64), poor).verdict.startswith("Take plain")
    with pytest.raises(ConfigError, match="fewer than 64 rounds"):
        advise(Question("anything"), {**STATE, "by_arm": {}})
    for odd in ({"proposed": 10**9}, {"tokens": 10**6}):
        ours = {**STATE["by_arm"], "ar": {**STATE["by_arm"]["ar"], **odd}}
        with pytest.raises(ConfigError, match="more than 256 drafts a round, or more tokens than drafts"):
            advise(Question("anything"), {**STATE, "by_arm": ours})
    with pytest.raises(ConfigError, match="over plain decoding is not known yet"):
        advise(Question("anything"), {**STATE, "priced_tokens": 0})


def test_what_a_server_copies_counts_as_its_report_counts_it() -> None:
    """A pair that hardly drafts beside copies and forced text that pay."""
    one = {"rounds": 300, "tokens": 303, "proposed": 1000, "accepted": 3}
    copied = {"rounds": 200, "tokens": 900, "proposed": 1000, "accepted": 700}
    pair = {"ar": one, "diffusion": one}
    state = {**STATE, "plain_seconds": 13.4, "by_arm": {**pair, "lookup": copied, "structure": copied}}
    found = advise(Question("Qwen3-8B", requests=(1, 4), answer=64), state)
    assert found.verdict == "Take WHIFLASH for its own traffic: 100 tokens a second, 1.34 of plain's 75."
    assert all(row.rates[OURS] < 1.1 * row.rates[PLAIN] for row in found.rows[1:])
    assert "Train" not in str(found.settings)
    assert "bundle create" not in str(found.settings)
    without = {**state, "by_arm": {"lookup": copied}}
    found = advise(Question("anything", requests=(1,)), without)
    assert "1.34 of plain's" in found.verdict
    assert (len(found.rows), "Train" in str(found.settings)) == (1, True)


def test_the_verdict_is_what_the_row_shows() -> None:
    rates = {PLAIN: 100.0, "EAGLE3": 190.0, "DSPARK": 240.0, OURS: 230.0, "NGRAM": 60.0}

    def verdict(**changed: float) -> str:
        return Estimate("40", "", rates | changed, 1.0, 3.0).verdict(0.26)

    assert verdict() == "DSPARK for 40: 240 tokens a second, 1.04 of WHIFLASH's 230 and 2.40 of plain's 100"
    better = verdict(WHIFLASH=248.0)
    assert better == "WHIFLASH for 40: 248 tokens a second, 1.03 of DSPARK's 240 and 2.48 of plain's 100"
    assert verdict(WHIFLASH=247.0).startswith("DSPARK for"), "the simpler one"
    by_set = Estimate("40", "", rates, 1.0, 3.0, ahead=(0.8, 1.0)).verdict(0.26)
    assert by_set.endswith("1.04 [1.00, 1.25] of WHIFLASH's 230 and 2.40 of plain's 100")
    level = verdict(EAGLE3=90.0, DSPARK=102.0, WHIFLASH=101.0)
    assert level == "plain for 40: 100 tokens a second, 0.99 of WHIFLASH's 101 and 0.98 of DSPARK's 102"
    assert verdict(DSPARK=104.0, EAGLE3=90.0, WHIFLASH=101.0).endswith(", which is within the error")


def test_replicas_are_taken_if_they_are_faster() -> None:
    question = Question("Qwen3-8B", cards=2, requests=(1, 32), answer=64)
    found = advise(question)
    alone, many = found.rows
    assert (alone.spread, many.spread) == ("--tp-size 2", "--dp-size 2")
    assert alone.choice == "DSPARK", "our draft passes are in no graph there"
    assert "0.5 ms a layer of WHIFLASH's drafters" in found.assumed
    (half,) = advise(question._replace(cards=1, requests=(16,))).rows
    assert many.rates == pytest.approx({way: 2 * rate for way, rate in half.rates.items()})
    assert "on one card ratios were" in found.assumed
    assert found.settings[-1].endswith("--concurrency 1,16"), "one replica is measured"
    (large,) = advise(question._replace(target="Qwen3-32B", requests=(8,), context=1 << 13)).rows
    (far,) = advise(question._replace(requests=(32,), context=1 << 15)).rows
    assert "router" in advise(question._replace(requests=(32,), context=1 << 15)).settings[0]
    assert (large.spread, far.spread) == ("--tp-size 2", "--dp-size 2"), "one card has no room; nor have both"


def test_ours_is_not_named_without_what_speaks_against_it() -> None:
    found = advise(Question("Qwen3-8B", requests=(8, 64), tools=1.0, answer=64)).verdict
    assert found.startswith("Take WHIFLASH for 8 requests")
    assert "; without grammars DSPARK for 8 requests. No card has served trained weights with WHIFLASH" in found


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
    for title in ("As measured on cards", "Drafters (", "Set:", "You give up", "Not in the rows"):
        assert title in shown.output
    found = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert found["rows"][0]["choice"] in found["verdict"]
    digits = "9" * 5000
    for wrong in ("--requests=1,many", "--requests=4097", "--context=128 kB", "--gpu=rtx4090", f"--context={digits}"):
        assert isinstance(CliRunner().invoke(app, ["advise", "qwen3-8b", wrong]).exception, UsageError)


def test_a_report_compares_with_the_servers_prices() -> None:
    whole = brought(STATE)
    assert (whole["gain"], whole["tokens_per_second"]) == (1.5, 100.0)
    prefills = brought({**STATE, "tokens": 3000})
    assert (prefills["tokens_per_second"], prefills["seconds"]) == (100.0, 30.0), "two of three were not timed"
    half = brought({**STATE, "timed_seconds": 20.0, "timed_tokens": 2000, "tokens": 2000})
    assert (half["gain"], half["seconds"]) == (1.5, 20.0), "of the rounds whose plain price was known"
    guessed = brought({**STATE, "priced_seconds": 0, "priced_tokens": 0, "plain_seconds": 0})
    assert [guessed[name] for name in ("gain", "plain_tokens_per_second")] == [None] * 2
    assert guessed["tokens_per_second"] == 100.0
    assert brought({**STATE, "replicas": [{}, {}]})["tokens_per_second"] == 200.0
    with pytest.raises(ConfigError, match="no round yet"):
        brought({**STATE, "tokens": 0})
