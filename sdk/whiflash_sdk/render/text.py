"""Renders traces for a terminal: the same contents as the HTML page, in the terminal's colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from whiflash_sdk.render import aligned
from whiflash_sdk.render.aligned import Piece, Turn, printable
from whiflash_sdk.report import Report
from whiflash_sdk.trace import Trace

COLOURS: Final = {"ar": 4, "diffusion": 3, "lookup": 2, "structure": 5, "none": 8}
"""Indices of colours in the terminal's palette, by drafter."""
OTHER: Final = 6
MOST_ROUNDS: Final = 10_000
"""Most rounds that the strip shows for a stretch without counts by round."""
_LEVELS: Final = "▁▂▃▄▅▆▇█"

SAVED: Final = "estimated time saved"


def terminal(trace: Trace, text: str = "", *, title: str = "Who drafted this answer", colour: bool = True) -> str:
    """Render one response as text; without `colour` each stretch is preceded by its drafter's name."""
    return conversation_terminal([Turn(title, text, trace)], colour=colour)


def conversation_terminal(turns: Sequence[Turn], *, colour: bool = True) -> str:
    """Render each response as text: its stretches, a strip of its rounds, and its totals.

    Escape sequences in the model's text are shown as pictures of their characters.
    """
    return "\n".join(line for number, turn in enumerate(turns, 1) for line in _turn(turn, number, colour))


def figures(trace: Trace) -> str:
    """Render the counts of a trace, without the response's text."""
    head = (aligned.summary(trace), aligned.reasons(trace), *map(printable, trace.notes))
    return "\n".join(line for line in (*head, *_totals(trace), *_sources(trace)) if line)


def report(found: Report) -> str:
    """Render the tables of a report over several answers."""
    return "\n".join(_report(found))


def _report(found: Report) -> Iterator[str]:
    unknown = "no time saved is known, since the server has timed too few rounds without drafts"
    known = unknown if found.total.saved is None else f"{SAVED} by the server's own prices"
    yield f"{aligned.count(found.total.answers, 'answer')}; {known}"
    for title, rows in found.groups:
        wide = max(len(printable(row.name)) for row in (*rows, found.total)) if rows else 0
        yield ""
        top = f"{'answers':>9}{'tokens':>8}{'rounds':>8}{'acceptance length':>19}{'seconds':>10}{'saved':>10}"
        by_drafter = "" if title == "Drafter" else "  by drafter"
        yield f"{title:<{max(wide, len(title))}}{top}{by_drafter}"
        for row in rows if title == "Drafter" else (*rows, found.total):
            name = f"{printable(row.name):<{max(wide, len(title))}}"
            taken = "" if row.seconds is None else f"{row.seconds:.2f} s"
            figures = f"{row.answers:>9}{row.tokens:>8}{row.rounds:>8}{row.acceptance_length:>19.2f}"
            yield f"{name}{figures}{taken:>10}{aligned.seconds(row.saved):>10}  {printable(row.by_drafter)}".rstrip()


def _turn(turn: Turn, number: int, colour: bool) -> Iterator[str]:
    title = printable(turn.title).replace("\n", " ")
    yield _paint(f"{number}. {title}", "1", colour)
    yield aligned.summary(turn.trace)
    used = {stretch.arm for stretch in turn.trace.stretches}
    if not used and turn.trace.reasons:
        yield aligned.reasons(turn.trace)
    yield from map(printable, turn.trace.notes)
    if colour and used:
        yield "  ".join(_paint(printable(arm), _code(arm), colour) for arm in aligned.in_order(used))
    yield "".join(_text(aligned.pieces(turn), colour))
    if strip := _strip(turn.trace, colour):
        yield strip
    yield from _totals(turn.trace)
    yield from _sources(turn.trace)
    yield ""


def _text(parts: Sequence[Piece], colour: bool) -> Iterator[str]:
    span = ""
    for piece in parts:
        kind = printable(piece.span or "")
        if kind != span:
            yield f"{' ' + span + ']' if span else ''}{'[' + kind + ' ' if kind else ''}"
            span = kind
        if piece.stretch is None:
            yield printable(piece.text)
        elif colour:
            code = _code(piece.stretch.arm)
            for text, is_targets in aligned.by_author(piece):
                # A colour must not run over a line's end: pagers reset colours at each line.
                lines = printable(text).split("\n")
                yield "\n".join(_paint(line, code, not is_targets) for line in lines)
        else:
            yield f"‹{printable(piece.stretch.arm)}›{printable(piece.text)}"
    if span:
        yield f" {span}]"


def _code(arm: str) -> str:
    number = COLOURS.get(arm, OTHER)
    return str(number + (30 if number < 8 else 82))


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and text else text


def _strip(trace: Trace, colour: bool) -> str:
    """Draw a bar for each round, as high as the tokens that it committed; as their mean if the trace has no counts."""
    rounds = [
        (tokens, stretch.arm)
        for stretch in trace.stretches
        for tokens in stretch.round_tokens or (stretch.acceptance_length,) * min(stretch.rounds, MOST_ROUNDS)
    ]
    longest = max(1, *(tokens for tokens, _ in rounds)) if rounds else 1
    levels = len(_LEVELS) - 1
    return "".join(
        _paint(_LEVELS[round(max(tokens, 0) / longest * levels)], _code(arm), colour) for tokens, arm in rounds
    )


def _totals(trace: Trace) -> Iterator[str]:
    saved = "" if aligned.everything(trace).saved is None else f"{SAVED:>21}"
    yield f"{'drafter':<11}{'rounds':>7}{'tokens':>7}{'acceptance length':>18}{'drafts accepted':>16}{saved}"
    for arm, totals in (*trace.arms.items(), ("all", aligned.everything(trace))):
        drafts = "" if totals.proposed is None else f"{totals.accepted} of {totals.proposed}"
        row = f"{printable(arm):<11}{totals.rounds:>7}{totals.tokens:>7}{totals.acceptance_length:>18.2f}"
        yield f"{row}{drafts:>16}{aligned.seconds(totals.saved):>21}".rstrip()


def _sources(trace: Trace) -> Iterator[str]:
    if not trace.sources:
        return
    priced = any(totals.saved is not None for totals in trace.sources.values())
    yield f"{'drafts from':<12}{'accepted':>18}{SAVED if priced else '':>23}".rstrip()
    for source, totals in trace.sources.items():
        drafts = f"{totals.accepted} of {totals.proposed}"
        yield f"{printable(source):<12}{drafts:>18}{aligned.seconds(totals.saved):>23}".rstrip()
