"""The files of `deploy/`: Prometheus takes them, alerts fire when they should, Grafana's schema has every field."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_server import ROOT, RULES, program

from whiflash_sglang.serve.metrics import PREFIX, SERIES

DASHBOARD = ROOT / "deploy" / "grafana" / "whiflash.json"
needs_promtool = pytest.mark.skipif(program("promtool") is None, reason="needs promtool: make prometheus")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((RULES / "whiflash.rules.yml").read_text("utf-8"))["groups"]
    return list(group["rules"])


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([str(program("promtool")), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_configuration() -> None:
    promtool("check", "config", RULES / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", RULES / "whiflash.rules.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_else_do_not() -> None:
    promtool("test", "rules", RULES / "whiflash.rules.test.yml")


def test_every_alert_is_tested_and_explained() -> None:
    tests = yaml.safe_load((RULES / "whiflash.rules.test.yml").read_text("utf-8"))["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if "exp_alerts" in one}
    silent = {one["alertname"] for one in tests[0]["alert_rule_test"]}
    page = (ROOT / "docs" / "how-to" / "production.md").read_text("utf-8")
    names = {rule["alert"] for rule in rules()}
    assert names == fired == silent
    for name in names:
        assert f"`{name}`" in page, f"{name}: docs/how-to/production.md does not say what to do"


def test_every_series_of_ours_that_is_asked_for_exists() -> None:
    """A misspelt one would be an empty panel, and an alert that never fires."""
    known = {series.full_name for series in SERIES}
    known |= {f"{s.full_name}_{part}" for s in SERIES if s.buckets for part in ("bucket", "count", "sum")}
    asked = " ".join([DASHBOARD.read_text("utf-8"), *(rule["expr"] for rule in rules())])
    named = set(re.findall(rf"{PREFIX}\w+", asked))
    assert named
    assert named <= known
    shown = set(re.findall(rf"{PREFIX}\w+", DASHBOARD.read_text("utf-8")))
    left = {s.full_name for s in SERIES if not any(name.startswith(s.full_name) for name in shown)}
    assert left == {f"{PREFIX}decode_seconds_total"}, "an alert reads it"


def test_grafanas_schema_has_every_field() -> None:
    """Grafana's own types of a dashboard (10.1) read it and lose nothing, as they would what they do not know."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="pip install grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()  # types of panels and queries
    given = json.loads(DASHBOARD.read_text("utf-8"))

    def lost(dashboard: Any) -> list[str]:
        read = json.loads(JSONEncoder().encode(models.Dashboard.from_json(dashboard)))
        return list(differences(dashboard, read, ""))

    assert lost(given) == []
    given["panels"][1]["targets"][0]["legendFormatt"] = "planted"
    given["panels"][1]["tittle"] = given["panels"][5]["options"]["legennd"] = "planted"
    assert len(lost(given)) == 3


def differences(given: Any, read: Any, path: str) -> Any:
    """Paths of what was given and is not what was read."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key, value in given.items():
            yield from differences(value, read.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for i, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif given != read:
        yield path
