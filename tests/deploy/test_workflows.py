"""Workflows and forms of the repository's host: they parse, and what they call is there."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from whiflash_sglang.engine.supported import SUPPORTED

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text("utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_is_there(workflow: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    ran = [step["run"] for step in steps(workflow) if "run" in step]
    assert ran
    for line in ran:
        assert set(re.findall(r"\bmake ([a-z-]+)", line)) <= targets, line
        for script in re.findall(r"\bbash (\S+)", line):
            assert (ROOT / script).is_file(), line


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_no_more_than_it_needs_and_pins_what_it_uses(workflow: Path) -> None:
    read = yaml.safe_load(workflow.read_text("utf-8"))
    assert read["permissions"] == {"contents": "read"}
    for step in steps(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]), "a tag may be moved"
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False
    versions = re.findall(r"uses: \S+(.*)", workflow.read_text("utf-8"))
    assert all(version.startswith(" # v") for version in versions), "for the bot and for readers"


def test_only_a_tag_publishes_and_only_what_was_built() -> None:
    (release,) = (path for path in WORKFLOWS if path.stem == "release")
    read = yaml.safe_load(release.read_text("utf-8"))
    assert read[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    publish = read["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert not any("checkout" in step.get("uses", "") for step in publish["steps"])
    assert publish["steps"][-1]["with"] == {"attestations": True}


def test_at_night_all_runs_with_every_release_and_what_is_red_is_an_issue() -> None:
    (nightly,) = (path for path in WORKFLOWS if path.stem == "nightly")
    read = yaml.safe_load(nightly.read_text("utf-8"))
    assert tuple(read["jobs"]["releases"]["strategy"]["matrix"]["version"]) == SUPPORTED
    crons = {each["cron"] for each in read[True]["schedule"]}
    for job in read["jobs"].values():
        assert job["if"].removeprefix("github.event.schedule != ").strip("'") in crons
        *_, ran, opened = job["steps"]
        assert ran["shell"] == "bash", "of another shell's pipe the last command decides"
        assert opened["if"] == "failure() || cancelled()", "what takes too long is cancelled"
        assert job["permissions"]["issues"] == "write"
    assert {"make canary SUITE=whole", "make evidence 2>&1"} <= {
        " ".join(job["steps"][-2]["run"].split()[:3]) for job in read["jobs"].values()
    }
