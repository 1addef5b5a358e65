"""`whiflash trace` on a terminal, in a pipe and without colours: who drafted what can always be told."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

WHIFLASH = str(Path(sys.executable).with_name("whiflash"))
ESCAPE = "\x1b["


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


def in_a_pipe(*arguments: str, **env: str) -> str:
    command = [WHIFLASH, "trace", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env})
    return done.stdout


def on_a_terminal(*arguments: str, **env: str) -> str:
    ours, theirs = pty.openpty()
    command = [WHIFLASH, "trace", *arguments]
    clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    shown = subprocess.Popen(command, stdout=theirs, env={**clean, "TERM": "xterm-256color", **env})
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert shown.wait() == 0
    return said.decode()


def test_a_pipe_gets_marks_instead_of_colours(recorded: Path) -> None:
    said = in_a_pipe(str(recorded))
    assert ESCAPE not in said
    assert "‹ar›Hello ‹lookup›world" in said


def test_a_terminal_gets_colours(recorded: Path) -> None:
    said = on_a_terminal(str(recorded))
    assert ESCAPE in said
    assert "‹ar›" not in said


def test_no_color_is_honoured(recorded: Path) -> None:
    said = on_a_terminal(str(recorded), NO_COLOR="1")
    assert ESCAPE not in said
    assert "‹ar›Hello ‹lookup›world" in said


def test_who_asks_for_colours_gets_them_in_a_pipe(recorded: Path) -> None:
    assert ESCAPE in in_a_pipe(str(recorded), "--colour")
    assert ESCAPE not in on_a_terminal(str(recorded), "--no-colour")
