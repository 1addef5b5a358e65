"""`make audit`: what pip-audit reports is named, what was accepted is not, and no answer is no all-clear."""

import json
import subprocess
from typing import Any

import pytest
from loaded_scripts import load_script

REPORT = {
    "dependencies": [
        {"name": "sound", "version": "1.0", "vulns": []},
        {"name": "weak", "version": "2.1", "vulns": [{"id": "PYSEC-1"}, {"id": "GHSA-2"}]},
        {"name": "local", "skip_reason": "not on an index"},
    ],
    "fixes": [],
}


@pytest.mark.parametrize(
    ("answer", "accepted", "code", "said"),
    [
        (json.dumps(REPORT), {}, 1, "weak 2.1: PYSEC-1\nweak 2.1: GHSA-2\n"),
        (json.dumps(REPORT), {"PYSEC-1": "unused"}, 1, "weak 2.1: GHSA-2\n"),
        (
            json.dumps(REPORT),
            {"PYSEC-1": "unused", "GHSA-2": "unused"},
            0,
            "2 packages, no known weakness; unknown to the database: local\n",
        ),
        (json.dumps({"dependencies": [{"name": "a", "skip_reason": "?"}] * 3}), {}, 2, ""),
        (json.dumps({"dependencies": []}), {}, 2, ""),
        ("", {}, 2, ""),
    ],
)
def test_what_is_known_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    accepted: dict[str, str],
    code: int,
    said: str,
) -> None:
    script = load_script("audit")

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, answer, "Traceback\nConnectionError: nobody there\n")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "ACCEPTED", accepted)
    assert script.main() == code
    out, err = capsys.readouterr()
    assert out == said
    assert ("nothing is known: ConnectionError: nobody there" in err) == (not answer)
    assert bool(err) == (code == 2)
