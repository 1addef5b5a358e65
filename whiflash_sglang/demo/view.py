"""What the demo shows: each answer by drafter, and the figures against plain decoding."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from whiflash_sdk.render import terminal

from whiflash_sglang.demo.asking import TARGET, Answer
from whiflash_sglang.equality import Comparison, Verdict

PICTURE_WIDTH = 100
"""Columns."""
_FONTS = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def show(answers: Sequence[Answer], console: Console) -> None:
    """Answers and tables; where `console` has no colours, drafters' names stand before their text."""
    console.print(f"Target: {TARGET}")
    _show_answers(answers, console)
    console.print(_speeds(answers))
    console.print(_drafters(answers))
    ties = sum(a.comparison.verdict is Verdict.TIE for a in answers)
    console.print(
        f"{len(answers)} answers compared with plain decoding, {ties} ties (rounding decided between two tokens)."
    )


def write_picture(answers: Sequence[Answer], path: Path) -> None:
    """The answers and their speeds, as an SVG file that loads nothing."""
    console = recording(PICTURE_WIDTH)
    _show_answers(answers, console)
    console.print(_speeds(answers))
    write_recorded(console, "demo", path)


def recording(width: int) -> Console:
    """A terminal of so many columns that nobody sees, for `write_recorded`."""
    return Console(
        file=io.StringIO(), record=True, width=width, force_terminal=True, color_system="truecolor"
    )


def write_recorded(console: Console, command: str, path: Path) -> None:
    """What was printed, as an SVG file that loads nothing, titled `whiflash COMMAND`."""
    drawn = console.export_svg(title=f"whiflash {command}", unique_id=command)
    # Rich names a font from the web, which pages that show pictures do not let them load.
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    path.write_text(drawn.replace("Fira Code, monospace", _FONTS), encoding="utf-8")


def _show_answers(answers: Sequence[Answer], console: Console) -> None:
    colour = console.color_system is not None and not console.no_color
    for answer in answers:
        console.rule(f"[bold]{answer.question}[/]")
        # The trace clocks one answer, the table repeated ones beside plain decoding: only the table shows speeds.
        trace = answer.trace.model_copy(update={"seconds": None, "gain": None})
        said = terminal(trace, answer.text, title=answer.question, colour=colour)
        console.print(Text.from_ansi(said))
        for call in answer.calls:
            console.print(f"call: {call}\n", markup=False, highlight=False)


def _speeds(answers: Sequence[Answer]) -> Table:
    table = Table(title="Against plain decoding, interleaved in this run (output tokens per second, medians)")
    for column in ("question", "plain", "WHIFLASH", "ratio", "acceptance length", "switches", "answer"):
        table.add_column(column, justify="left" if column in ("question", "answer") else "right")
    for a in answers:
        table.add_row(
            a.question,
            f"{a.plain_tokens_per_s:.1f}",
            f"{a.whiflash_tokens_per_s:.1f}",
            f"{a.speedup:.2f}",
            f"{a.trace.acceptance_length:.2f}",
            str(a.trace.switches),
            _verdict(a.comparison),
        )
    return table


def _drafters(answers: Sequence[Answer]) -> Table:
    table = Table(title="Acceptance length per drafter (tokens per target forward, bonus token included)")
    for column in ("drafter", "rounds", "tokens", "acceptance length"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    totals: dict[str, list[int]] = {}
    for a in answers:
        for arm, total in a.trace.arms.items():
            entry = totals.setdefault(arm, [0, 0])
            entry[0] += total.rounds
            entry[1] += total.tokens
    for arm, (rounds, tokens) in sorted(totals.items()):
        table.add_row(arm, str(rounds), str(tokens), f"{tokens / rounds:.2f}")
    return table


def _verdict(comparison: Comparison) -> str:
    if comparison.verdict is Verdict.IDENTICAL:
        return "identical"
    gap = "" if comparison.top_two is None else f", gap {comparison.top_two.gap:.3f}"
    return f"{comparison.verdict.value} at token {comparison.position}{gap}"
