"""The 8B-shaped part's own code on tiny shapes: every arm runs, and rounds accept what they are told to."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import shaped


def test_rounds_accept_as_much_as_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped, "recorded", lambda: {"ar": 3.0, "diffusion": 2.0})
    assert shaped.main(["--device", "cpu", "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["label"].startswith("a rehearsal")
    assert found["checks"]["plain"]["tokens_per_s_at_2"] > 0
    # Rounds commit 23 tokens of each answer, of one request twice and of two side by side twice.
    for arm, rounds in (("ar", 8), ("diffusion", 12)):
        assert found["checks"][arm]["tokens_per_round"] == 6 * 23 / (4 * rounds)


def test_what_was_recorded_is_the_reports() -> None:
    assert all(1 < mean < 10 for mean in shaped.recorded().values())
    assert shaped.recorded().keys() == shaped.ARMS.keys()
