"""Renders the HTML page: one file, no script, nothing loaded. Its template `page.html` escapes text from the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any, Final, NamedTuple

from jinja2 import Environment
from markupsafe import Markup

from whiflash_sdk.render import aligned
from whiflash_sdk.render.aligned import KNOWN_ARMS, Piece, Turn, printable
from whiflash_sdk.report import Report
from whiflash_sdk.trace import Stretch, Trace

FITTING: Final = 200
"""Most tokens that are distinguishable in a timeline as wide as the page."""
DEEPEST_ZOOM: Final = 64
_TICKS: Final = 8


class Column(NamedTuple):
    """A column of the timeline: the tokens of one stretch, or tokens between two stretches that no round wrote.

    place: among the columns, from 1. number: of the stretch, from 1.
    """

    place: int
    begin: int
    tokens: int
    stretch: Stretch | None = None
    before: Stretch | None = None
    number: int = 0

    @property
    def span(self) -> str | None:
        """Return the span of the stretch; None without a stretch or span."""
        return self.stretch.span if self.stretch else None


def columns_of(stretches: Sequence[Stretch]) -> list[Column]:
    """Return a timeline's columns, left to right: one for each stretch, and one for each gap before a stretch."""
    columns: list[Column] = []
    end, before = 0, None
    for number, stretch in enumerate(stretches, 1):
        if stretch.start > end:
            columns.append(Column(len(columns) + 1, end, stretch.start - end))
        tokens = max(stretch.tokens, 0)
        columns.append(Column(len(columns) + 1, stretch.start, tokens, stretch, before, number))
        end, before = max(end, stretch.end), stretch
    return columns


def zooms(tokens: int) -> list[int]:
    """Return the possible widths of a timeline of `tokens` tokens, as multiples of the page's width."""
    levels = [1]
    while levels[-1] < DEEPEST_ZOOM and tokens > FITTING * levels[-1]:
        levels.append(levels[-1] * 2)
    return levels


def ticks(tokens: int) -> list[tuple[int, float]]:
    """Return the token numbers below the timeline, each with the zoom from which it is shown."""
    step = next(step for step in _steps() if tokens <= step * _TICKS)
    # A narrow page (zoom 0.5) has room for every second number.
    zooms_by_place: dict[int, float] = dict.fromkeys(range(0, tokens + 1, 2 * step), 0.5)
    for level in zooms(tokens):
        if step % level == 0:
            for place in range(0, tokens + 1, step // level):
                zooms_by_place.setdefault(place, level)
    return sorted(zooms_by_place.items())


def _steps() -> Iterator[int]:
    """Yield possible distances between two numbers of the axis, ascending: 1, 2, 5, 10, 20, 50, ..."""
    size = 1
    while True:
        yield from (size, 2 * size, 5 * size)
        size *= 10


_LONG: Final = 2000
"""Characters from which a text is shown in a box that the reader can expand."""
_QUOTED: Final = 60


def html(trace: Trace, text: str = "", *, title: str = "Who drafted this answer", model: str | None = None) -> str:
    """Render one response as a self-contained HTML page (see `conversation_html`)."""
    return conversation_html([Turn(title, text, trace, model)], title=title)


def conversation_html(turns: Sequence[Turn], *, title: str = "WhiFlash trace") -> str:
    """Render a self-contained HTML page: each response's figures, timeline, text coloured by drafter, and tables.

    It works without network and script, by keyboard (Tab walks the timeline), in light and dark, wide and narrow.
    """
    arms = [arm for turn in turns for arm in turn.trace.arms]
    return str(_template().conversation(title, turns, arms))


def report_html(report: Report) -> str:
    """Render a self-contained HTML page of the sums over several answers, by agent, tool, turn and drafter."""
    return str(_template().report(report, "WhiFlash report"))


@cache
def _template() -> Any:
    """Load the template; its macros are attributes of the result."""
    page, style = (files("whiflash_sdk.render").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css"))
    environment = Environment(autoescape=True, finalize=_shown)
    ours = (_before, _class_of, _quoted, _runs, _texts_of, columns_of, ticks, zooms)
    environment.globals.update({name: value for name, value in vars(aligned).items() if name[0] != "_"})
    environment.globals.update({value.__name__.removeprefix("_"): value for value in ours})
    environment.globals.update(style=Markup(style), LONG=_LONG)
    return environment.from_string(page).module


def _shown(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _class_of(arm: str) -> str:
    """Return the CSS class with a drafter's colours."""
    return f"arm-{arm}" if arm in KNOWN_ARMS else "arm-other"


def _before(trace: Trace, number: int) -> Stretch | None:
    return trace.stretches[number - 2] if number > 1 else None


def _texts_of(parts: Sequence[Piece]) -> dict[int, str]:
    """Return the text of each stretch, by its number."""
    return {piece.number: piece.text for piece in parts if piece.stretch is not None}


def _runs(parts: Iterable[Piece | Column]) -> list[tuple[str | None, list[Piece | Column]]]:
    """Group consecutive parts of the same span; return each span with its parts."""
    return [(span, list(run)) for span, run in groupby(parts, key=lambda piece: piece.span)]


def _quoted(text: str) -> str:
    """Quote the beginning of a text in one line."""
    short = " ".join(text[: 4 * _QUOTED].split())
    return short[:_QUOTED] + ("…" if len(short) > _QUOTED else "")
