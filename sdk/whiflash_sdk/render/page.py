"""The HTML page: one file, no script, nothing loaded. In its template, `page.html`, text from the model is data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any, Final
from zlib import crc32

from jinja2 import Environment
from markupsafe import Markup

from whiflash_sdk.render import aligned
from whiflash_sdk.render.aligned import KNOWN_ARMS, Piece, Turn, printable
from whiflash_sdk.render.timeline import Column, columns_of, ticks, zooms
from whiflash_sdk.report import Report
from whiflash_sdk.trace import Stretch, Trace

_LONG: Final = 2000
"""Characters of a text that is shown in a box of its own, until its reader asks for all of it."""
_QUOTED: Final = 60


def html(trace: Trace, text: str = "", *, title: str = "Response", model: str | None = None) -> str:
    """A page that shows one response. See `conversation_html`."""
    return conversation_html([Turn(title, text, trace, model)], title=title)


def conversation_html(turns: Sequence[Turn], *, title: str = "WhiFlash trace") -> str:
    """A self-contained page: each response's figures, its timeline, its text coloured by drafter, and tables.

    Works without network and script, by keyboard (Tab walks the timeline), in light and dark, wide and narrow.
    """
    arms = [arm for turn in turns for arm in turn.trace.arms]
    return str(_template().conversation(title, turns, arms))


def report_html(found: Report, *, title: str = "WhiFlash report") -> str:
    """A self-contained page: what several answers came to, by agent, tool, turn and drafter."""
    return str(_template().report(found, title))


def fragment(trace: Trace) -> str:
    """The same of one trace as a part of somebody else's page, such as a notebook's: no script, nothing loaded."""
    prefix = f"trace-{crc32(repr(trace).encode('utf-8', 'replace')):08x}"
    return str(_template().fragment(Turn("", "", trace), prefix))


@cache
def _template() -> Any:
    """The template's macros."""
    page, style = (
        files("whiflash_sdk.render").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css")
    )
    environment = Environment(autoescape=True, finalize=_shown)
    names = (
        "SOURCES",
        "REASONS",
        "count",
        "describe",
        "everything",
        "in_order",
        "pieces",
        "reasons",
        "seconds",
        "why",
    )
    ours = (_before, _class_of, _percent, _quoted, _runs, _texts_of)
    environment.globals.update({name: getattr(aligned, name) for name in names})
    environment.globals.update({one.__name__.removeprefix("_"): one for one in ours})
    environment.globals.update(
        columns_of=columns_of, ticks=ticks, zooms=zooms, style=Markup(style), LONG=_LONG
    )
    return environment.from_string(page).module


def _shown(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _class_of(arm: str) -> str:
    """The class that has a drafter's colours."""
    return f"arm-{arm}" if arm in KNOWN_ARMS else "arm-other"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _before(trace: Trace, number: int) -> Stretch | None:
    return trace.stretches[number - 2] if number > 1 else None


def _texts_of(parts: Sequence[Piece]) -> dict[int, str]:
    """Texts by number of the stretch."""
    return {part.number: part.text for part in parts if part.stretch is not None}


def _runs(parts: Iterable[Piece | Column]) -> list[tuple[str | None, list[Piece | Column]]]:
    """Neighbours in the same span, with it."""
    return [(span, list(run)) for span, run in groupby(parts, key=lambda part: part.span)]


def _quoted(text: str) -> str:
    """The beginning of a text, in one line."""
    short = " ".join(text[: 4 * _QUOTED].split())
    return short[:_QUOTED] + ("…" if len(short) > _QUOTED else "")
