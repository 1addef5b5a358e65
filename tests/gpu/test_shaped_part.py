"""The 8B-shaped part's own code on tiny shapes: every arm runs, and rounds accept what they are told to."""

import json
from pathlib import Path

import pytest
import real
import shaped
from safetensors.torch import load_file

from whiflash_sglang.prices.round_clock import STAGES

PINNED = {"auto": 2.5, "diffusion": 2.5, "DFLASH": 3.0, "DFLASH-4": 3.0, "ar": 2.0, "none": 1.0, "plain": 1.0}


@pytest.mark.evidence
def test_rounds_accept_as_much_as_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped, "recorded", lambda: PINNED)
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")  # restored, where the part sets it itself
    arms = ",".join(shaped.ARMS)
    assert shaped.main(["--device", "cpu", "--arms", arms, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["label"].startswith("a rehearsal")
    # A prefill, and rounds that commit 23 tokens of each of two requests, which begin together.
    passes = {arm: 24 / found["checks"][arm]["tokens_per_pass_at_2_of_24"] for arm in shaped.ARMS}
    assert 10 <= passes.pop("auto") <= 24
    assert {arm: round(n) for arm, n in passes.items()} == {
        "diffusion": 10,
        "DFLASH": 9,
        "DFLASH-4": 11,
        "ar": 13,
        "none": 24,
        "plain": 24,
    }
    timed = found["checks"]["plain"]
    assert len(timed["ms_of_passes_at_2_of_24"]) == 24
    assert len(timed["both_median_ms_at_2_of_24"]) == 2
    assert timed["host_ms_by_stage_at_2_of_24"].keys() == set(STAGES)
    assert timed["tokens_per_s_without_slowest_at_2_of_24"] > timed["tokens_per_s_at_2_of_24"]
    assert found["checks"]["rounds"]["trace_of_2"]["on_host"]


@pytest.mark.evidence
def test_a_trained_pair_is_widened_and_asked_what_agents_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", "1")
    for options in ("--arms=none,plain,auto", "--agents --arms=none,auto"):
        assert real.main([*options.split(), "--device", "cpu", "--out", str(tmp_path / "out.json")]) == 0
        found = json.loads((tmp_path / "out.json").read_text())["checks"]
        assert found["pair"]["bytes"] > 100_000
        assert found["auto"]["2"]["answers_equal"] == 1
        assert found["auto"]["2"]["acceptance_length"] >= 1
        assert found["none"]["2"].keys() < found["auto"]["2"].keys()


def test_drafters_are_as_wide_as_the_shape_and_no_other(tmp_path: Path) -> None:
    made = shaped.write_models(tmp_path, shaped.TINY, "float32")
    assert shaped.TINY.hidden != shaped.tiny_models.HIDDEN
    for name, inputs in (("dflash", 1), ("eagle3", 2)):
        weights = load_file(made[name] / "model.safetensors").items()
        widths = {weight.shape[1] for key, weight in weights if key.endswith("q_proj.weight")}
        assert widths == {inputs * shaped.TINY.hidden}


def test_what_was_recorded_is_the_reports() -> None:
    assert all(1 <= mean < 10 for mean in shaped.recorded().values())
    assert shaped.recorded().keys() == shaped.ARMS.keys()


def test_prompts_of_more_tokens_than_a_card_holds_share_all_but_their_ends() -> None:
    for context, shared in ((2048, 0), (131_072, 129_024)):
        prompts = shaped.CARD.prompts(context, 8)
        assert int((prompts == prompts[:1]).all(0).sum()) == shared
