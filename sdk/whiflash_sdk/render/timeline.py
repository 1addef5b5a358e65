"""The timeline of a response: output tokens along x, a lane for every drafter, spans as bands behind the lanes.

HTML and CSS, no script: one grid with a column for every stretch, as wide as its tokens, so that lanes, spans, changes
of drafter and the axis meet at the same places at any width. In a stretch every round is drawn as its accepted drafts
and, in a stronger colour, the token that the model added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from whiflash_sdk.render.aligned import describe, in_order, why
from whiflash_sdk.render.markup import class_of, safe
from whiflash_sdk.trace import Stretch, Trace

FITTING: Final = 200
"""Tokens that are distinguishable in a timeline as wide as the page."""
DEEPEST_ZOOM: Final = 64
_TICKS: Final = 8
_QUOTED: Final = 60


class Column(NamedTuple):
    """Tokens of one stretch, or those between two that no round wrote. number: of the stretch, from 1."""

    begin: int
    tokens: int
    stretch: Stretch | None = None
    before: Stretch | None = None
    number: int = 0


def timeline(trace: Trace, prefix: str, texts: Mapping[int, str]) -> str:
    """The figure; empty for a trace without stretches.

    prefix: of the ids in the page. texts: by number of the stretch, of those that the page shows the text of, under the
        id `text_id(prefix, number)`.
    """
    columns = list(_columns(trace.stretches))
    if not columns:
        return ""
    arms = in_order(stretch.arm for stretch in trace.stretches)
    has_spans = any(stretch.span for stretch in trace.stretches)
    first = 2 if has_spans else 1
    rows = {arm: row for row, arm in enumerate(arms, first)}
    lanes = "".join(
        f'<div class="lane" aria-hidden="true" style="grid-row:{row}"></div>' for row in rows.values()
    )
    widths = " ".join(f"minmax(0,{column.tokens}fr)" for column in columns)
    heights = f"{'1.6rem ' if has_spans else ''}repeat({len(arms)},var(--lane)) 1.6rem"
    track = "".join(
        (lanes, *_spans(columns), *_changes(columns, rows), *_bands(columns, rows, prefix, texts))
    )
    end = columns[-1].begin + columns[-1].tokens
    levels = zooms(end)
    axis = f'<div class="axis" aria-hidden="true" style="grid-row:{first + len(arms)}">{_ticks(end, levels)}</div>'
    label = "Timeline: output tokens from left to right, a lane for each drafter"
    return (
        f'<figure class="timeline"><div class="head"><figcaption>{label}</figcaption>{_zoom(levels, prefix)}</div>'
        f'<div class="chart" style="--rows:{heights}">'
        f'<div class="names" aria-hidden="true">{"".join(_names(trace, rows))}</div>'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">'
        f'<div class="track" role="list" style="grid-template-columns:{widths}">{track}{axis}</div></div></div>'
        '<p class="hint">Point at a band, or go to it with Tab, to see why it begins. Enter shows its text.</p>'
        "</figure>"
    )


def text_id(prefix: str, number: int) -> str:
    """Where the page shows the text of a stretch."""
    return f"{prefix}-text-{number}"


def zooms(tokens: int) -> list[int]:
    """How many times as wide as the page a timeline of so many tokens may be drawn."""
    levels = [1]
    while levels[-1] < DEEPEST_ZOOM and tokens > FITTING * levels[-1]:
        levels.append(levels[-1] * 2)
    return levels


def _columns(stretches: Sequence[Stretch]) -> Iterator[Column]:
    end, before = 0, None
    for number, stretch in enumerate(stretches, 1):
        if stretch.start > end:
            yield Column(end, stretch.start - end)
        yield Column(stretch.start, max(stretch.tokens, 0), stretch, before, number)
        end, before = max(end, stretch.end), stretch


def _names(trace: Trace, rows: Mapping[str, int]) -> Iterator[str]:
    for arm, row in rows.items():
        totals = trace.arms.get(arm)
        share = f" <small>{totals.tokens / trace.tokens:.0%}</small>" if totals and trace.tokens else ""
        yield f'<div class="name {class_of(arm)}" style="grid-row:{row}"><bdi>{safe(arm)}</bdi>{share}</div>'


def _spans(columns: Sequence[Column]) -> Iterator[str]:
    """A band behind all lanes for every run of stretches in the same span."""
    place = 1
    for span, run in groupby(columns, key=lambda column: column.stretch.span if column.stretch else None):
        count = len(list(run))
        if span:
            yield (
                f'<div class="span" aria-hidden="true" title="{safe(span)}" style="grid-column:{place}/span {count}">'
                f"<span>{safe(span)}</span></div>"
            )
        place += count


def _changes(columns: Sequence[Column], rows: Mapping[str, int]) -> Iterator[str]:
    """A line from lane to lane wherever the drafter changes."""
    for place, column in enumerate(columns, 1):
        stretch, before = column.stretch, column.before
        if stretch is not None and before is not None and stretch.arm != before.arm:
            top, bottom = sorted((rows[stretch.arm], rows[before.arm]))
            yield (
                f'<div class="change" aria-hidden="true" style="grid-column:{place};grid-row:{top}/{bottom + 1}"></div>'
            )


def _bands(
    columns: Sequence[Column], rows: Mapping[str, int], prefix: str, texts: Mapping[int, str]
) -> Iterator[str]:
    for place, column in enumerate(columns, 1):
        stretch = column.stretch
        if stretch is None:
            continue
        text = texts.get(column.number)
        inner = f"{_rounds(stretch)}{_tip(column, stretch, text)}"
        names = f'class="band {class_of(stretch.arm)}"'
        band = (
            f'<span {names} tabindex="0">{inner}</span>'
            if text is None
            else f'<a {names} href="#{text_id(prefix, column.number)}">{inner}</a>'
        )
        yield f'<div role="listitem" style="grid-column:{place};grid-row:{rows[stretch.arm]}">{band}</div>'


def _rounds(stretch: Stretch) -> str:
    """Its rounds side by side; a single one repeated where the server sent no counts."""
    if stretch.round_tokens:
        return "".join(
            f'<i style="flex:{tokens};--k:{max(tokens, 1)}"></i>' for tokens in stretch.round_tokens
        )
    mean = max(stretch.acceptance_length, 1)
    return f'<i style="flex:1;--k:{mean:.3f};background-size:{100 / max(stretch.rounds, 1):.4f}% 100%"></i>'


def _tip(column: Column, stretch: Stretch, text: str | None) -> str:
    quoted = ""
    if text:
        short = " ".join(text[: 4 * _QUOTED].split())
        shown = short[:_QUOTED] + ("…" if len(short) > _QUOTED else "")
        quoted = f"<q><bdi>{safe(shown)}</bdi></q>" if shown else ""
    return (
        f'<span class="tip"><strong>{safe(why(stretch, column.before))}</strong>'
        f"<span>tokens {stretch.start}–{stretch.end} · {describe(stretch)}</span>{quoted}</span>"
    )


def _zoom(levels: Sequence[int], prefix: str) -> str:
    if len(levels) == 1:
        return ""
    choices = "".join(
        f'<label><input type="radio" name="{prefix}-zoom" value="{level}"{" checked" if level == 1 else ""}>'
        f"<span>{'Fit' if level == 1 else f'{level}×'}</span></label>"
        for level in levels
    )
    return f'<fieldset class="zoom"><legend>Zoom</legend>{choices}</fieldset>'


def _ticks(tokens: int, levels: Sequence[int]) -> str:
    """Numbers below the lanes; a deeper zoom shows those between."""
    step = _step(tokens)
    found: dict[int, float] = dict.fromkeys(
        range(0, tokens + 1, 2 * step), 0.5
    )  # room for half on a narrow page
    for level in levels:
        if step % level == 0:
            for place in range(0, tokens + 1, step // level):
                found.setdefault(place, level)
    return "".join(
        f'<span style="left:{place / max(tokens, 1):.4%};--from:{level:g}">{place}</span>'
        for place, level in sorted(found.items())
    )


def _step(tokens: int) -> int:
    """Tokens between two numbers of the axis: few enough numbers, and halves of it are round too."""
    size = 1
    while True:
        for step in (size, 2 * size, 5 * size):
            if tokens <= step * _TICKS:
                return step
        size *= 10
