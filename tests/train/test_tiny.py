"""`--config tiny`: every command in its order, on a random target, as a user would type them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny_models import tiny_target
from typer.testing import CliRunner

from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.cli import app

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"{' '.join(arguments)}\n{result.output}\n{result.exception!r}"
    return result.stdout


def answer_of(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output)
    return found


def prompt(index: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"say {index}"}]
    row: dict[str, Any] = {"id": f"r{index}", "category": ("chat", "code")[index % 2], "messages": messages}
    return row | ({"category": "tool_call", "tools": [TOOL]} if index % 8 == 0 else {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("tiny")
    tiny_target(directory / "tiny-target")
    shutil.copytree(embedded_bundle(), directory / "given")
    for name, rows in (("tiny-prompts", range(24)), ("held-out", range(100, 108))):
        lines = "".join(json.dumps(prompt(i)) + "\n" for i in rows)
        (directory / f"{name}.jsonl").write_text(lines)
    return directory


def test_from_prompts_to_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    config = ("--config", "tiny", "--json")
    assert answer_of(run("train", "--step", "data", *config))["sequences"] == 24
    for drafter in ("eagle3", "dflash"):
        assert Path(answer_of(run("train", "--step", drafter, *config))["checkpoint"]).is_dir()
    report = answer_of(run("train", "--step", "router", *config))
    assert report["answers"]["learn"] + report["answers"]["held_out"] == 24
    assert {"r_squared", "sign_accuracy", "entropy_sign_accuracy", "calibration"} <= report.keys()
    run("train", "--step", "bundle", "--out", "bundle", *config)
    check_router(root / "bundle" / "router")

    given = ("--round-ms", "eagle3=30,dflash=28", "--per-category", "32")
    run("lab", "calibrate", "--bundle", "bundle", "--config", "tiny", *given, "--out", "c.json")
    manifest, curves = load_manifest(Path("bundle")), json.loads(Path("c.json").read_text())
    assert manifest.router is not None
    assert manifest.router.threshold == pytest.approx(curves["routers"]["neural"]["threshold"], abs=1e-4)
    assert manifest.entropy.tau == pytest.approx(curves["routers"]["entropy"]["threshold"], abs=1e-4)
    rates = curves["tokens_per_second"]
    assert rates.keys() == {"ar", "diffusion"}
    assert min(rates.values()) > 0

    held_out = (
        "--prompts",
        "held-out.jsonl",
        "--max-new-tokens",
        "24",
        "--dtype",
        "float32",
        "--work",
        "kept",
    )
    run("lab", "evaluate", "--bundle", "bundle", *held_out, "--out", "e.json")
    figures = json.loads(Path("e.json").read_text())
    lengths = figures["overall"]["acceptance_length"]
    arms, routers = (
        {"ar", "diffusion", "lookup"},
        {"entropy", "neural", "auto-unpriced"},
    )
    assert lengths.keys() == arms | routers | {"oracle", "oracle-of-three"}
    assert figures["overall"]["oracle_gain_share"].keys() == routers
    assert set(figures["overall"]["rounds_won"]) == {"ar", "diffusion"}
    assert max(lengths[arm] for arm in arms) <= lengths["oracle-of-three"] + 1e-9
    assert set(figures["categories"]) <= {"chat", "code", "tool_call"}

    # A router trained into an existing bundle.
    assert answer_of(run("train", "--step", "router", *config, "--out", "bundle"))["router"]
    router = load_manifest(Path("bundle")).router
    assert router is not None
    assert router.threshold == 0.0


def check_router(directory: Path) -> None:
    provenance = json.loads((directory / "provenance.json").read_text())
    assert provenance["config"]["router"]["epochs"] == 3
    assert provenance["data"][0]["sequences"] == 24
    assert json.loads((directory / "report.json").read_text())["positions"]["learn"] > 0
    with safe_open(directory / "router.safetensors", framework="pt") as file:
        assert file.metadata()["delta_sign"] == "ar-minus-diffusion"
        assert set(file.keys()) >= {"first.weight", "second.weight", "heads.weight"}


@pytest.mark.parametrize(
    ("round_ms", "message"),
    [
        ("eagle3=30", "milliseconds of a round of both drafters"),
        ("eagle3=fast,dflash=2", "eagle3=31.0,dflash=28.5"),
    ],
)
def test_calibrate_says_what_it_needs(
    root: Path, monkeypatch: pytest.MonkeyPatch, round_ms: str, message: str
) -> None:
    monkeypatch.chdir(root)
    before = (root / "given/whiflash.json").read_text()
    result = CliRunner().invoke(
        app, ["lab", "calibrate", "--bundle", "given", "--config", "tiny", "--round-ms", round_ms]
    )
    assert result.exit_code == 1
    assert message in str(result.exception)
    assert (root / "given/whiflash.json").read_text() == before
