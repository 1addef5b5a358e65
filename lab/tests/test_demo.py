"""Output of the demo for given answers. `make demo` checks that it runs."""

import io

from rich.console import Console
from whiflash_sdk.trace import Trace

from whiflash_lab.bench.reference import Comparison
from whiflash_lab.demo import DemoAnswer, show
from whiflash_sglang.files.equality import Verdict

TRACE = Trace.model_validate(
    {
        "version": 1,
        "policy": "auto",
        "rounds": 3,
        "tokens": 12,
        "switches": 1,
        "arms": {"ar": {"rounds": 2, "tokens": 5}, "lookup": {"rounds": 1, "tokens": 7}},
        "seconds": 0.75,
        "gain": 1.7,
    }
)
ANSWERS = [
    DemoAnswer("chat", "Hello [bold]world", [], TRACE, 10.0, 25.0, Comparison(Verdict.IDENTICAL)),
    DemoAnswer("tool call", "", ['f({"a": "[x]"})'], TRACE, 10.0, 12.5, Comparison(Verdict.IDENTICAL)),
]


def test_answers_calls_and_figures_are_shown() -> None:
    """The trace's own clock has another answer's speed, which would disagree with the table's."""
    out = io.StringIO()
    show(ANSWERS, Console(file=out, width=120))
    for shown in ("Hello [bold]world", 'call: f({"a": "[x]"})', "2.50", "1.25", "25.0"):
        assert shown in out.getvalue()
    for other in ("\x1b", "16.0", "tokens a second", "1.70"):
        assert other not in out.getvalue()
