"""`--config tiny`: every command in its order, on a random target, as a user would type them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_target
from typer.testing import CliRunner

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.cli.app import app

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
    run("train", "--step", "bundle", "--out", "bundle", *config)

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
        {"entropy", "auto-unpriced"},
    )
    assert lengths.keys() == arms | routers | {"oracle", "oracle-of-three"}
    assert figures["overall"]["oracle_gain_share"].keys() == routers
    assert set(figures["overall"]["rounds_won"]) == {"ar", "diffusion"}
    assert max(lengths[arm] for arm in arms) <= lengths["oracle-of-three"] + 1e-9
    assert set(figures["categories"]) <= {"chat", "code", "tool_call"}
