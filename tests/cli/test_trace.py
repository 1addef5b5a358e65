"""`whiflash trace` on a terminal, in a pipe and without colours: who drafted what can always be told."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from in_process import whiflash

from whiflash_sglang.cli.trace import turns_of
from whiflash_sglang.errors import ConfigError

ESCAPE, MARKS = "\x1b[", "‹ar›Hello ‹lookup›world"


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    def stretch(start: int, arm: str, chars: tuple[int, int]) -> dict[str, object]:
        counts = {"rounds": 1, "accepted": 1, "round_tokens": [2]}
        return {"start": start, "end": start + 2, "arm": arm, "reason": "score", "chars": chars, **counts}

    trace = {
        "version": 1,
        "policy": "auto",
        "rounds": 2,
        "tokens": 4,
        "switches": 1,
        "stretches": [stretch(1, "ar", (0, 6)), stretch(3, "lookup", (6, 11))],
        "arms": {"ar": {"rounds": 1, "tokens": 2}, "lookup": {"rounds": 1, "tokens": 2}},
    }
    choice = {"message": {"content": "Hello world"}}
    (tmp_path / "answers.json").write_text(json.dumps({"choices": [choice], "sglext": {"whiflash": [trace]}}))
    return tmp_path / "answers.json"


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(False, "", False), (True, "", True), (True, "1", False)]
)
def test_a_terminal_gets_colours_others_marks(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    done = whiflash("trace", str(recorded), terminal=terminal)
    assert (done.returncode, ESCAPE in done.stdout, MARKS in done.stdout) == (0, coloured, not coloured)


def test_every_choice_and_other_routes_answers_have_their_text(recorded: Path) -> None:
    first = json.loads(recorded.read_text())
    (trace,) = first["sglext"]["whiflash"]
    second = {"index": 1, "message": {"content": "Howdy world"}}
    several = {"choices": [*first["choices"], second], "sglext": {"whiflash": [trace, {**trace, "choice": 1}]}}
    said = [{"content": [{"type": "output_text", "text": "Salve mundi"}]}, {"name": "f", "arguments": "{}"}]
    response = {"text": None, "output": said, "sglext": {"whiflash": [trace]}}
    message = {"type": "message", "content": [{"type": "text", "text": "Hallo world"}], "sglext": response["sglext"]}
    recorded.write_text(json.dumps([several, response, message]))
    shown = whiflash("trace", str(recorded)).stdout
    for text in ("‹ar›Hello ", "‹ar›Howdy ", "‹ar›Salve ", "f({})", "‹ar›Hallo ", "choice 1"):
        assert text in shown, text


SUMS: dict[str, Any] = {"version": 1, "policy": "auto", "rounds": 1, "tokens": 2, "arms": {}}
STRETCH = {"start": 0, "end": 10**9, "arm": "ar", "rounds": 10**9, "accepted": 0}


def test_a_torn_last_line_takes_no_other_with_it(tmp_path: Path) -> None:
    """A writer that was ended leaves one; a line in the middle that is no JSON is named."""
    line = json.dumps({"id": "abc", "sglext": {"whiflash": SUMS}}) + "\n"
    file = tmp_path / "traces.jsonl"
    file.write_text(line * 2 + line[:40])
    assert len(turns_of(file)) == 2
    for torn, number in ((line + line[:40] + "\n" + line, 2), (line[:40], 1)):
        file.write_text(torn)
        with pytest.raises(ConfigError, match=rf"traces\.jsonl, line {number}: not JSON"):
            turns_of(file)


ODD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "another version": ({"version": 2}, {}),
    "a wrong type": ({"rounds": [1]}, {}),
    "a number of digits": ({"tokens": "9" * 3000}, {}),
    "seconds of no request": ({"seconds": 1e300}, {}),
    "sums that are too large together": ({"arms": {"ar": {"rounds": 1, "tokens": 1, "saved": 1e308}}}, {}),
    "rounds that nobody lists": ({"stretches": [STRETCH]}, {}),
    "no list of choices": ({}, {"choices": 5}),
    "no text": ({}, {"choices": [{"message": {"tool_calls": [{"function": 3}]}}]}),
}
"""Fields of a trace and of its answer."""


@pytest.mark.parametrize("how", ODD)
def test_an_answer_that_does_not_fit_is_named(tmp_path: Path, how: str) -> None:
    trace, answer = ODD[how]
    good, odd = (
        json.dumps({"id": "x", **more, "sglext": {"whiflash": one}})
        for one, more in ((SUMS, {}), ({**SUMS, **trace}, answer))
    )
    file = tmp_path / "traces.jsonl"
    file.write_text(f"{good}\n{odd}\n{good}\n")
    with pytest.raises(ConfigError, match=f"{file}, response 2 "):
        turns_of(file)


def test_what_is_no_file_of_answers_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(b"\xff\n[]\n")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ConfigError, match="cannot be read"):
            turns_of(path)
