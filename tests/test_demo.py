"""What the demo prints of given answers. That it runs is `make demo`'s own business."""

import io
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from whiflash_sdk.trace import Trace

from whiflash_sglang.equality import Comparison, Verdict
from whiflash_sglang.lab.demo import QUESTIONS, Answer, show, write_picture

ARMS = {"ar": {"rounds": 2, "tokens": 5}, "lookup": {"rounds": 1, "tokens": 7}}
TRACE = Trace.model_validate(
    {
        "version": 1,
        "policy": "auto",
        "rounds": 3,
        "tokens": 12,
        "switches": 1,
        "arms": ARMS,
        "seconds": 0.75,
        "gain": 1.7,
    }
)
ANSWERS = [
    Answer("chat", "Hello [bold]world", [], TRACE, 10.0, 25.0, Comparison(Verdict.IDENTICAL)),
    Answer("tool call", "", ['f({"a": "[x]"})'], TRACE, 10.0, 12.5, Comparison(Verdict.IDENTICAL)),
]


def test_answers_calls_and_figures_are_shown() -> None:
    out = io.StringIO()
    show(ANSWERS, Console(file=out, width=120))
    said = out.getvalue()
    assert "Hello [bold]world" in said
    assert 'call: f({"a": "[x]"})' in said
    assert "2.50" in said
    assert "1.25" in said
    assert "\x1b" not in said


def test_speeds_are_those_of_one_measurement() -> None:
    """The trace's own clock has another answer's, and would disagree with the table."""
    out = io.StringIO()
    show(ANSWERS, Console(file=out, width=120))
    assert "25.0" in out.getvalue()
    for other in ("16.0", "tokens a second", "1.70"):
        assert other not in out.getvalue()


def test_the_picture_loads_nothing(tmp_path: Path) -> None:
    write_picture(ANSWERS, tmp_path / "demo.svg")
    drawn = (tmp_path / "demo.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    assert "url(http" not in drawn
    assert 'url("http' not in drawn
    assert "Fira" not in drawn
    assert "Hello" in drawn


def test_the_tool_is_strict_and_the_answer_ends_with_the_call() -> None:
    """Without it so small a model copies the schema into the arguments, and invents what the tool said."""
    question = QUESTIONS["tool call"]
    assert question["tools"][0]["function"]["strict"] is True
    assert question["stop"] == ["</tool_call>"]
