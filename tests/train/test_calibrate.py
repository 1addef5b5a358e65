"""Thresholds from walks worked out by hand, and a manifest that is replaced whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from whiflash_sglang.checkpoints.bundles import update_manifest
from whiflash_sglang.checkpoints.manifest import load_manifest
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lab.calibration import parse_round_costs, sweep
from whiflash_sglang.train.bundle import install_router
from whiflash_sglang.train.replay import Replay
from whiflash_sglang.train.walk import choices_above

SECONDS = {"ar": 2.0, "diffusion": 1.0}


def answer(eagle3: list[int], dflash: list[int], category: str = "chat") -> Replay:
    size = len(eagle3)
    accepted = {"ar": np.array(eagle3), "diffusion": np.array(dflash), "lookup": np.zeros(size, int)}
    return Replay("a", category, accepted, torch.zeros(size, 2), size, *np.zeros((2, size)))


def test_the_best_threshold_reaches_the_oracle() -> None:
    one = answer([3] * 8, [0] * 4 + [3] * 4)
    signal = np.array([1.0] * 4 + [-1.0] * 4)
    curve = sweep([one], [signal], SECONDS, lowest=-2.0, min_dwell=0)
    assert -1.0 <= curve.chosen < 1.0
    assert curve.rates[curve.chosen] == pytest.approx(8 / 3)
    assert curve.rates[-2.0] == pytest.approx(2.0)  # always EAGLE-3
    assert curve.rates[1.0] == pytest.approx(8 / 5)  # never
    assert choices_above(signal, curve.chosen) == {i: "ar" if i < 4 else "diffusion" for i in range(8)}


def test_categories_weigh_the_same() -> None:
    many = [answer([1] * 40, [0] * 40, "code"), answer([0] * 4, [0] * 4, "json")]
    signals = [np.zeros(40), np.zeros(4)]
    curve = sweep(many, signals, {"ar": 1.0, "diffusion": 1.0}, lowest=-1.0, min_dwell=0)
    assert curve.rates[-1.0] == pytest.approx(1.5)  # always EAGLE-3


@pytest.mark.parametrize("text", ["", "eagle3=1", "eagle3=1,dflash=0", "eagle3=1,dflash=x", "a=1,b=2"])
def test_round_costs_that_say_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match=r"eagle3=31\.0,dflash=28\.5"):
        parse_round_costs(text)


def test_round_costs_are_milliseconds() -> None:
    assert parse_round_costs("dflash=28.5,eagle3=31") == {"diffusion": 0.0285, "ar": 0.031}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    manifest = {"schema_version": 1, "name": "n", "target": "t", "eagle3": "e", "dflash": "d"}
    directory = tmp_path / "bundle"
    directory.mkdir()
    (directory / "whiflash.json").write_text(json.dumps(manifest))
    return directory


def test_a_manifest_keeps_what_is_not_changed(bundle: Path) -> None:
    update_manifest(bundle, {"entropy": {"tau": 0.3, "min_dwell": 1}})
    assert load_manifest(bundle).entropy.tau == 0.3
    assert load_manifest(bundle).name == "n"
    assert [path.name for path in bundle.iterdir()] == ["whiflash.json"]


def test_a_wrong_manifest_is_never_written(bundle: Path) -> None:
    before = (bundle / "whiflash.json").read_text()
    with pytest.raises(ConfigError, match="tau"):
        update_manifest(bundle, {"entropy": {"tau": -1}})
    assert (bundle / "whiflash.json").read_text() == before
    assert [path.name for path in bundle.iterdir()] == ["whiflash.json"]


def test_a_router_is_replaced_whole(bundle: Path, tmp_path: Path) -> None:
    for content in ("old", "new"):
        trained = tmp_path / content
        trained.mkdir()
        (trained / "router.safetensors").write_text(content)
        (trained / f"{content}.json").write_text("{}")
        install_router(bundle, trained)
    assert {path.name for path in (bundle / "router").iterdir()} == {"router.safetensors", "new.json"}
    router = load_manifest(bundle).router
    assert router is not None
    assert (router.path, router.threshold) == ("router", 0.0)
