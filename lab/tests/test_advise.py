"""`whiflash advise` and `report`: assumptions come first, published ratios come out, a bad deal is called one."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from whiflash_lab.advise import BETWEEN, GPUS, OURS, PLAIN, Estimate, Question, _card, _fitting, _gpu, advise
from whiflash_lab.published import FACTS, KNOWN, PublishedTarget, Ratio, Shape, of_directory
from whiflash_lab.simulate import PublishedPair, SimulatedLoad, Simulation
from whiflash_sglang.cli.app import app
from whiflash_sglang.cli.report import brought
from whiflash_sglang.drafts import arms
from whiflash_sglang.errors import ConfigError, UsageError

RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("target", [f"models/{one.name}/" for one in KNOWN])
def test_every_known_target_has_an_answer(target: str) -> None:
    found = advise(Question(target, cards=4, requests=(4,), answer=64))
    assert found.assumed.startswith("Nothing was measured here")
    (row,) = found.rows
    assert row.low <= row.rates[OURS] / row.rates[PLAIN] * 1.05
    assert row.high >= row.rates[OURS] / row.rates[PLAIN] * 0.95
    assert {*row.rates} >= {PLAIN, "NGRAM", OURS}
    (published,) = (one for one in KNOWN if one.name in target)
    assert ("with one drafter" in found.lost[0]) == (not published.eagle3 or not published.block)
    assert len(found.settings) >= 2


def test_the_page_that_decides_shows_todays_estimate() -> None:
    page = (Path(__file__).parents[2] / "docs" / "when-to-use.md").read_text("utf-8")
    found = advise(Question("Qwen3-8B", requests=(40,), tools=0.3))
    assert found.verdict in page
    assert all(f"{rate:,.0f}" in page for rate in found.rows[0].rates.values())
    (far,) = advise(Question("Qwen3-8B", "h200", requests=(1,), context=1 << 15)).rows
    assert (
        f"{far.rates[PLAIN]:.0f} tokens a second of Qwen3-8B for one request, {far.rates['DSPARK']:.0f} with DSPARK "
        f"and {far.rates[OURS]:.0f} with WHIFLASH" in " ".join(page.split())
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
        return Simulation(_card(target.shape, GPUS[gpu], 1, requests=requests), load, method, pair=pair).run().rate

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
    assert _card(KNOWN[1].shape, GPUS["h200"], 1).block == pytest.approx(1.044e-3, rel=0.15), "results/gpu/shaped.json"


def test_a_long_context_takes_time_and_memory() -> None:
    near, far = (advise(Question("Qwen3-8B", requests=(8,), answer=64, context=n)) for n in (0, 1 << 17))
    assert far.rows[0].rates["plain"] < 0.5 * near.rows[0].rates["plain"]
    assert far.rows[0].rates[OURS] > far.rows[0].rates[PLAIN]
    assert "4.25 of EAGLE3 and 5.27 of DSPARK tokens a round" in far.assumed
    assert "131,072 cached" in far.assumed
    (full,) = near.obstacles + far.obstacles
    assert full.startswith("KV for 8 × 131,648 tokens takes 155 GB: 2 requests fit, 2 beside two drafters")
    assert ("needs YaRN" in near.assumed, "beyond 40,960 positions" in far.assumed) == (False, True)


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
    assert f"{again.rates[found.choices[1]]:,.0f} tokens a second" in found.verdict
    served = next(line for line in found.settings if line.startswith("whiflash serve"))
    size = -int(-64 * ((1 << 15) + 512 + 64) * slot // 1e9)
    assert f"--enable-session-radix-cache --enable-hierarchical-cache --hicache-size {size}" in served
    (narrow,) = (line for line in found.settings if line.startswith("--kv-cache-dtype"))
    plain, ours = map(int, re.findall(r"(\d+) (?:agents|beside)", narrow))
    (full,) = found.obstacles
    assert full.startswith("KV for 64 × 33,344 tokens takes 315 GB")
    before = list(map(int, re.findall(r"(\d+) requests fit", full)))
    assert plain >= 2 * before[0] > 0
    assert ours < plain
    assert not advise(question._replace(context=0)).rows[1].returning
    assert "--hicache-size" not in str(advise(question._replace(context=0)).settings)


STATE: dict[str, Any] = {"tokens": 1000, "timed_seconds": 10.0, "timed_tokens": 1000, "plain_price": {}, "by_arm": {}}
STATE |= {"priced_seconds": 10.0, "priced_tokens": 1000, "plain_seconds": 15.0}


def test_what_is_within_the_error_is_level_and_has_the_simplest_way_until_it_is_measured() -> None:
    rates = {PLAIN: 100.0, "EAGLE3": 150.0, "DSPARK": 240.0, OURS: 230.0, "NGRAM": 60.0}

    def verdict(**changed: float) -> str:
        return Estimate("40", "", rates | changed, 1.0, 3.0).verdict(0.26)

    level = (
        "level, so measure: DSPARK 240, WHIFLASH 230, plain only 100 tokens a second. Until then take DSPARK, "
        "which needs no plugin."
    )
    assert verdict() == level
    assert verdict(WHIFLASH=280.0).startswith("level, so measure: WHIFLASH 280, DSPARK 240")
    ahead = "take WHIFLASH: 330 tokens a second, 1.38 times DSPARK's 240 and 3.30 times plain's 100."
    assert verdict(WHIFLASH=330.0) == ahead, f"{BETWEEN} is an error that was made"
    assert verdict(EAGLE3=90.0, DSPARK=120.0, WHIFLASH=101.0).endswith(
        "DSPARK 120, WHIFLASH 101, plain 100 tokens a second. Until then take plain, which needs no drafter."
    )


def test_replicas_are_taken_if_they_are_faster() -> None:
    question = Question("Qwen3-8B", cards=2, requests=(1, 32), answer=64)
    found = advise(question)
    alone, many = found.rows
    assert (alone.spread, many.spread) == ("--tp-size 2", "--dp-size 2")
    assert alone.rates[OURS] < 0.9 * alone.rates["DSPARK"], "our draft passes are in no graph there"
    assert "0.5 ms a layer of WHIFLASH's drafters" in found.assumed
    (half,) = advise(question._replace(cards=1, requests=(16,))).rows
    assert many.rates == pytest.approx({way: 2 * rate for way, rate in half.rates.items()})
    assert "on one GPU ratios were" in found.assumed
    assert found.settings[-1].endswith("--concurrency 1,16"), "one replica is measured"
    (large,) = advise(question._replace(target="Qwen3-32B", requests=(8,), context=1 << 13)).rows
    (far,) = advise(question._replace(requests=(32,), context=1 << 15)).rows
    assert "router" in advise(question._replace(requests=(32,), context=1 << 15)).settings[0]
    assert (large.spread, far.spread) == ("--tp-size 2", "--dp-size 2"), "one card has no room; nor have both"


def test_every_drafter_of_the_bundle_is_measured_and_what_is_lost_is_the_targets(tmp_path: Path) -> None:
    found = advise(Question("Qwen3-Coder-30B-A3B-Instruct", cards=2, requests=(40,), answer=64, tools=0.3))
    assert "--dflash z-lab/Qwen3-Coder-30B-A3B-DFlash" in str(found.settings)
    assert "--arms none,EAGLE3,DFLASH,NGRAM,auto" in found.settings[-1]
    assert "DFLASH has no row, since no acceptance is published" in found.verdict
    assert "fewer tokens of Qwen/Qwen3-Coder-30B-A3B-Instruct" in found.lost[0]
    eight = advise(Question("Qwen3-8B", "NVIDIA H100 80GB HBM3", requests=(1,), answer=64))
    assert "1 × H100 hold 22 % fewer tokens of Qwen/Qwen3-8B (draft KV, and 4.6 GB a GPU)" in eight.lost[0]
    hybrid = advise(Question("Qwen3.5-35B-A3B", "h200", requests=(1,), answer=16))
    assert "hold 55 % fewer tokens" in hybrid.lost[0], "24,576 bytes beside the target's 20,480"
    (narrow,) = (one.shape for one in KNOWN if one.name == "Qwen/Qwen3-Coder-Next")
    assert _fitting(narrow, Question("", cards=8, context=1 << 17), 8, 0) == 31, "12,288 bytes a token on each card"


QWEN8 = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN8 |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}


def test_any_target_is_read_from_its_directory(tmp_path: Path) -> None:
    (tmp_path := tmp_path / "my models").mkdir()

    def shape(**config: Any) -> Shape:
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = of_directory(tmp_path)
        assert found is not None
        return found.shape

    known = next(one.shape for one in KNOWN if one.name == "Qwen/Qwen3-8B")
    read = shape(**QWEN8)
    assert read.parameters == pytest.approx(known.parameters, rel=0.01)
    assert (read.kv, read.layers, read.positions, read.width) == (known.kv, 36, 40960, 4096)
    mixture = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_key_value_heads": 4}
    experts = shape(text_config={**QWEN8, **sizes, **mixture}, time_step_limit=[0.0, float("inf")])
    assert (experts.parameters, experts.active) == (pytest.approx(30.5e9, rel=0.01), pytest.approx(3.3e9, rel=0.03))
    assert (experts.kv, experts.experts, experts.used) == (98304, 128, 8)
    assert shape(**QWEN8, full_attention_interval=4).kv == known.kv / 4
    mixed = ["linear_attention", "conv", "sliding_attention", "full_attention"] * 9
    windows = shape(**QWEN8, layer_types=mixed, num_experts=None)
    assert (windows.kv, windows.width, windows.experts) == (known.kv / 2, known.width / 4, 0)
    used = shape(**QWEN8, num_experts=8, moe_topk=[2, 2]).used, shape(**QWEN8, num_experts=8, top_k_experts=2).used
    fp8 = shape(text_config=QWEN8, quantization_config={"quant_method": "fp8"})
    assert (used, fp8.weight_bytes, fp8.weights) == ((2, 2), pytest.approx(1.152, rel=0.01), "8-bit")
    groups = {"group_0": {"input_activations": {"num_bits": 8}, "weights": {"num_bits": 4}}}
    assert shape(**QWEN8, quantization_config={"config_groups": groups}).expert_bytes == 0.5
    assert "ASSUMED" in shape(**QWEN8, quantization_config={"quant_method": "hqq"}).weights
    found = advise(Question(str(tmp_path), requests=(1,), answer=64))
    assert "ASSUMED" in found.assumed
    faster = advise(Question(str(tmp_path), requests=(1,), answer=64, acceptance=6.0))
    assert faster.rows[0].rates["EAGLE3"] > found.rows[0].rates["EAGLE3"]
    assert any(re.fullmatch(f"sglang serve '{tmp_path}' --spec.* DRAFTER", line) for line in faster.settings)
    for odd in ({"num_experts": 2, "num_experts_per_tok": 2}, {"num_attention_heads": 2 * QWEN8["hidden_size"]}):
        shape(**{**QWEN8, "head_dim": None, **odd})
        assert advise(Question(str(tmp_path), cards=4, requests=(1,), answer=16)).rows
    for text, message in (
        ('{"hidden_size": 1}', "num_hidden_layers: Field required"),
        ("[1]", r"config\.json is damaged: a JSON object is expected"),
        ('{"hidden_size": 1', r"config\.json cannot be read: "),
        (json.dumps(QWEN8 | {"num_experts": 8}), "8 experts, but no number of those that a token uses: add"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            advise(Question(str(tmp_path)))
    with pytest.raises(UsageError, match=r"config\.json is missing"):
        advise(Question(str(tmp_path.parent)))


@pytest.mark.parametrize(
    ("printed", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA H20", "H20"),
        ("h200", "H200"),
    ],
)
def test_a_card_has_the_name_that_its_driver_prints(printed: str, card: str) -> None:
    assert _gpu(printed).name == card


def test_what_cannot_be_answered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for unknown in ("owner/model", "~no-such-user/model"):
        with pytest.raises(ConfigError, match="nothing is known of it; known are Qwen/Qwen3-4B"):
            advise(Question(unknown))
    with pytest.raises(ConfigError, match="did you mean Qwen/Qwen3-Coder-30B-A3B-Instruct or Qwen/Qwen3-Coder-Next"):
        advise(Question("Qwen/Qwen3-Coder"))
    with pytest.raises(ConfigError, match="--gpu: 'h1000' is not one of"):
        advise(Question("Qwen3-8B", gpu="h1000"))
    monkeypatch.setitem(GPUS, "a100", GPUS["a100"]._replace(memory=40e9))
    large = advise(Question("gpt-oss-120b", gpu="a100", requests=(1,), answer=16))
    assert re.search(r"does not fit 1 × A100 of 40 GB: .* It takes 2 × A100: --count 2", large.verdict)
    assert [large.rows, large.settings, large.obstacles] == [[]] * 3
    (three,) = advise(Question("Qwen3-8B", cards=3, requests=(1,), answer=16)).rows
    assert three.spread == "--dp-size 3", "three cards do not divide 32 heads"
    idle = advise(Question("gpt-oss-120b", gpu="a100", cards=3, requests=(1,), answer=16))
    assert "--tp-size 2" in str(idle.settings)
    two = advise(Question("gpt-oss-120b", gpu="a100", cards=2, requests=(1,), answer=16))
    assert (two.obstacles, "--tp-size 2" in str(two.settings)) == ([], True)


def test_the_command_shows_and_prints_json(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["advise", "qwen3-8b", "--requests", "1", "--answer", "32", "--tools", "0.3", "--context", "128k"]
    shown = CliRunner().invoke(app, line)
    assert shown.stdout.startswith("Estimate for 1 request: ")
    assert "131,072 cached" in " ".join(shown.stdout.split())
    assert "simulating loads" in shown.stderr
    for title in ("As measured on GPUs", "Drafters (", "Set:", "You give up", "Not in the rows"):
        assert title in shown.output
    found = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert found["rows"][0]["choice"] in found["verdict"]
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, CliRunner().invoke(app, line).stdout.split("\n\n")[0].splitlines())) <= 60
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
