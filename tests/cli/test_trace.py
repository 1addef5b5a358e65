"""`whiflash trace` on a terminal, in a pipe and without colours: who drafted what can always be told."""

import json
from pathlib import Path

import pytest
from in_process import whiflash

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
    ("terminal", "no_color", "words", "coloured"),
    [
        (False, "", (), False),
        (True, "", (), True),
        (True, "1", (), False),
        (False, "", ("--colour",), True),
        (True, "", ("--no-colour",), False),
    ],
)
def test_a_terminal_and_who_asks_for_them_get_colours_others_marks(
    recorded: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    no_color: str,
    words: tuple[str, ...],
    coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    done = whiflash("trace", str(recorded), *words, terminal=terminal)
    assert (done.returncode, ESCAPE in done.stdout, MARKS in done.stdout) == (0, coloured, not coloured)


def test_every_choice_and_other_routes_answers_have_their_text(recorded: Path) -> None:
    first = json.loads(recorded.read_text())
    (trace,) = first["sglext"]["whiflash"]
    second = {"index": 1, "message": {"content": "Howdy world"}}
    several = {
        "choices": [*first["choices"], second],
        "sglext": {"whiflash": [trace, {**trace, "choice": 1}]},
    }
    said = [{"content": [{"type": "output_text", "text": "Salve mundi"}]}, {"name": "f", "arguments": "{}"}]
    response = {"text": None, "output": said, "sglext": {"whiflash": [trace]}}
    message = {
        "type": "message",
        "content": [{"type": "text", "text": "Hallo world"}],
        "sglext": response["sglext"],
    }
    recorded.write_text(json.dumps([several, response, message]))
    shown = whiflash("trace", str(recorded), "--no-colour").stdout
    for text in ("‹ar›Hello ", "‹ar›Howdy ", "‹ar›Salve ", "f({})", "‹ar›Hallo ", "choice 1"):
        assert text in shown, text
