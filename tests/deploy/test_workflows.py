"""Workflows may no more than they need, pin what they use, and publish only what a tag built."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

WORKFLOWS = sorted((Path(__file__).parents[2] / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text("utf-8"))["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_no_more_than_it_needs_and_pins_what_it_uses(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text("utf-8"))["permissions"] == {"contents": "read"}
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
