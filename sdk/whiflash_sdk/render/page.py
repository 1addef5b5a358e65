"""The HTML page: one file, no script, nothing loaded; text from the model is data and stays it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import groupby
from zlib import crc32

from whiflash_sdk.render.aligned import (
    REASONS,
    SOURCES,
    Piece,
    Turn,
    count,
    describe,
    everything,
    in_order,
    pieces,
    reasons,
    seconds,
    why,
)
from whiflash_sdk.render.markup import class_of, safe
from whiflash_sdk.render.timeline import text_id, timeline
from whiflash_sdk.report import Report, Share
from whiflash_sdk.trace import ArmTotals, Trace

# No script may run and nothing may be fetched, whatever the text says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_INTRODUCTION = """In every round one drafter proposes a few tokens and the model checks them in one pass: it keeps
those that it would have written itself and adds one of its own, in the stronger colour.
<strong>Acceptance length</strong> is tokens per round; without a drafter it is 1."""
_ARMS = {
    "ar": "EAGLE-3: one token after another",
    "diffusion": "DFlash: a block of tokens at once",
    "lookup": "copied from the context",
    "structure": "what a grammar forces",
    "none": "no draft: plain decoding",
}
_UNCOLOURED = {
    False: 'The trace is a summary; one asked for with trace="full" says which text is whose.',
    True: "The trace does not say where its stretches are in the text, so the text is not coloured.",
}
_SAVED = "Estimated time saved"
_LONG = 2000
"""Characters of a text that is shown in a box of its own, until its reader asks for all of it."""


def html(trace: Trace, text: str = "", *, title: str = "Response", model: str | None = None) -> str:
    """A page that shows one response. See `conversation_html`."""
    return conversation_html([Turn(title, text, trace, model)], title=title)


def conversation_html(turns: Sequence[Turn], *, title: str = "WhiFlash trace") -> str:
    """A self-contained page: each response's figures, its timeline, its text coloured by drafter, and tables.

    Works without network and script, by keyboard (Tab walks the timeline), in light and dark, wide and narrow.
    """
    sections = "\n".join(_section(turn, f"turn-{number}", number) for number, turn in enumerate(turns, 1))
    legend = _legend([arm for turn in turns for arm in turn.trace.arms])
    return _page(title, f"{legend}\n{_contents(turns)}\n{sections}")


def report_html(found: Report, *, title: str = "WhiFlash report") -> str:
    """A self-contained page: what several answers came to, by agent, tool, turn and drafter."""
    total = found.total
    facts = [(f"{total.acceptance_length:.2f}", "acceptance length"), (f"{total.tokens}", "tokens")]
    facts.append((f"{total.answers}", "answer" if total.answers == 1 else "answers"))
    if total.seconds is not None:
        facts.append((f"{total.seconds:.2f} s", "from first token to last"))
    if total.saved is not None:
        facts.append((seconds(total.saved), "saved against plain decoding, an estimate"))
    tables = "\n".join(
        f"<section>{_shares(name, rows, None if name == 'Drafter' else total)}</section>"
        for name, rows in found.groups
    )
    return _page(title, f"{_legend(total.arms)}\n<section>{_cells(facts)}</section>\n{tables}")


def _shares(title: str, rows: Sequence[Share], total: Share | None) -> str:
    heads = [title, "Answers", "Tokens", "Rounds", "Acceptance length", "Seconds", _SAVED]
    heads += [] if total is None else ["By drafter"]
    foot = "" if total is None else f"<tfoot>{_share(total)}</tfoot>"
    body = "".join(_share(row, by_drafter=total is not None) for row in rows)
    return _table(f"By {title.lower()}", heads, f"<tbody>{body}</tbody>{foot}")


def _share(row: Share, *, by_drafter: bool = True) -> str:
    taken = "" if row.seconds is None else f"{row.seconds:.2f} s"
    cells = [row.answers, row.tokens, row.rounds, f"{row.acceptance_length:.2f}", taken, seconds(row.saved)]
    drafters = f'<td class="wide">{safe(row.by_drafter)}</td>' if by_drafter else ""
    figures = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{safe(row.name)}</th>{figures}{drafters}</tr>'


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)}</title>
<style>{_style()}</style>
</head>
<body class="whiflash page">
<main>
<h1>{safe(title)}</h1>
<p class="note">{_INTRODUCTION}</p>
{body}
</main>
</body>
</html>
"""


def fragment(trace: Trace) -> str:
    """The same of one trace as a part of somebody else's page, such as a notebook's: no script, nothing loaded."""
    turn = Turn("", "", trace)
    prefix = f"trace-{crc32(repr(trace).encode('utf-8', 'replace')):08x}"
    return (
        f'<div class="whiflash"><style>{_style()}</style>{_legend(trace.arms)}{_section(turn, prefix)}</div>'
    )


def _style() -> str:
    return files("whiflash_sdk.render").joinpath("page.css").read_text("utf-8")


def _legend(arms: Iterable[str]) -> str:
    entries = (
        f'<li><span class="stretch {class_of(arm)}">{safe(arm)}</span> {_ARMS.get(arm, "")}</li>'
        for arm in in_order(arms)
    )
    return f'<ul class="legend" aria-label="Drafters">{"".join(entries)}</ul>'


def _contents(turns: Sequence[Turn]) -> str:
    if len(turns) < 2:
        return ""
    entries = "".join(
        f'<li><a href="#turn-{number}">{safe(turn.title)}</a> <small>{turn.trace.tokens} tokens, '
        f"{turn.trace.acceptance_length:.2f} a round</small></li>"
        for number, turn in enumerate(turns, 1)
    )
    return f'<nav aria-label="Responses"><ol>{entries}</ol></nav>'


def _section(turn: Turn, prefix: str, number: int = 0) -> str:
    trace, parts = turn.trace, pieces(turn)
    numbers = {id(stretch): number for number, stretch in enumerate(trace.stretches, 1)}
    texts = {numbers[id(part.stretch)]: part.text for part in parts if part.stretch is not None}
    title = f"{number}. {safe(turn.title)}" if number else "Routing of a response"
    return f"""<section aria-labelledby="{prefix}">
<h2 id="{prefix}">{title}</h2>
{_facts(turn)}
{timeline(trace, prefix, texts)}
{_text(turn, parts, prefix, numbers)}
{_totals(trace)}
{_sources(trace)}
{_stretches(trace)}
</section>"""


def _facts(turn: Turn) -> str:
    trace = turn.trace
    named = f"<strong>{safe(turn.model)}</strong> · " if turn.model else ""
    found = [(f"{trace.acceptance_length:.2f}", "acceptance length")]
    if trace.gain is not None:
        found.append((f"{trace.gain:.2f}×", "estimated gain over plain decoding"))
    if trace.tokens_per_second is not None:
        found.append((f"{trace.tokens_per_second:.1f}", "tokens a second"))
    found.append((f"{trace.tokens}", f"tokens in {count(trace.rounds, 'round')}"))
    drafts = everything(trace)
    if drafts.proposed:
        found.append(
            (f"{(drafts.accepted or 0) / drafts.proposed:.0%}", f"of {drafts.proposed} drafts accepted")
        )
    switches = "switch" if trace.switches == 1 else "switches"
    found.append((f"{trace.switches}", f"{switches} of drafter"))
    notes = "".join(f'<p class="note">{safe(note)}</p>' for note in trace.notes)
    return f'<p class="note">{named}policy {safe(trace.policy)}</p>{notes}{_cells(found)}'


def _cells(facts: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<div><dt>{meaning}</dt><dd>{value}</dd></div>" for value, meaning in facts)
    return f'<dl class="facts">{cells}</dl>'


def _text(turn: Turn, parts: Sequence[Piece], prefix: str, numbers: dict[int, int]) -> str:
    if not parts:
        return ""
    note = ""
    if all(part.stretch is None for part in parts):
        note = f'<p class="note">{_UNCOLOURED[bool(turn.trace.stretches)]}</p>'
    body = "".join(_spans(parts, turn.trace, prefix, numbers))
    length = sum(len(part.text) for part in parts)
    more = ""
    if length > _LONG:
        more = f'<label class="more"><input type="checkbox"> Show all {length:,} characters</label>'
    return (
        f'{note}<div class="answer">{more}<div class="text" tabindex="0" role="group" aria-label="Response text">'
        f"{body}</div></div>"
    )


def _spans(parts: Sequence[Piece], trace: Trace, prefix: str, numbers: dict[int, int]) -> Iterator[str]:
    """Stretches, with a bracket around neighbours in the same span."""
    for kind, group in groupby(parts, key=lambda part: part.span):
        inner = "".join(_piece(part, trace, prefix, numbers) for part in group)
        if kind:
            name = safe(kind)
            inner = f'<span class="edge">[{name} </span>{inner}<span class="edge"> {name}]</span>'
        yield inner


def _piece(part: Piece, trace: Trace, prefix: str, numbers: dict[int, int]) -> str:
    text = f"<bdi>{safe(part.text)}</bdi>"
    if part.stretch is None:
        return f'<span class="unrouted">{text}</span>'
    number = numbers[id(part.stretch)]
    before = trace.stretches[number - 2] if number > 1 else None
    title = f"{safe(why(part.stretch, before))} · {describe(part.stretch)}"
    return (
        f'<span class="stretch {class_of(part.stretch.arm)}" id="{text_id(prefix, number)}" title="{title}">'
        f"{text}</span>"
    )


def _totals(trace: Trace) -> str:
    rows = [(arm, trace.arms[arm]) for arm in sorted(trace.arms, key=lambda arm: -trace.arms[arm].tokens)]
    body = "".join(_row(arm, totals, trace.tokens) for arm, totals in rows)
    together = everything(trace)
    total = _row("all", together, trace.tokens)
    heads = ["Drafter", "Rounds", "Tokens", "Share", "Acceptance length", "Drafts accepted"]
    heads += [] if together.saved is None else [_SAVED]
    return _table("Totals", heads, f"<tbody>{body}</tbody><tfoot>{total}</tfoot>")


def _row(arm: str, totals: ArmTotals, tokens: int) -> str:
    share = totals.tokens / tokens if tokens else 0.0
    drafts = "" if totals.proposed is None else f"{totals.accepted} of {totals.proposed}"
    cells = [totals.rounds, totals.tokens, f"{share:.0%}", f"{totals.acceptance_length:.2f}", drafts]
    cells += [] if totals.saved is None else [seconds(totals.saved)]
    return f'<tr><th scope="row">{safe(arm)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _sources(trace: Trace) -> str:
    """What each hint brought, by what drafts were taken from."""
    if not trace.sources:
        return ""
    body = "".join(
        f'<tr><th scope="row">{safe(source)}</th><td>{SOURCES.get(source, "")}</td>'
        f"<td>{totals.accepted} of {totals.proposed}</td>"
        f"{'' if totals.saved is None else f'<td>{seconds(totals.saved)}</td>'}</tr>"
        for source, totals in sorted(trace.sources.items(), key=lambda item: -item[1].accepted)
    )
    priced = any(totals.saved is not None for totals in trace.sources.values())
    heads = ["Source", "What it is", "Drafts accepted", *([_SAVED] if priced else [])]
    return _table("What drafts were taken from", heads, f"<tbody>{body}</tbody>")


def _table(caption: str, heads: Sequence[str], rows: str) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<div class="table"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"{rows}</table></div>"
    )


def _stretches(trace: Trace) -> str:
    """The timeline's facts in words, for who does not look at it."""
    if not trace.stretches:
        return f'<p class="note">{safe(reasons(trace))}</p>' if trace.reasons else ""
    rows = "".join(
        f"<tr><td>{s.start}–{s.end}</td><td>{safe(s.arm)}</td><td>{safe(s.reason)}</td><td>{safe(s.span or '')}</td>"
        f"<td>{s.rounds}</td><td>{'' if s.proposed is None else s.proposed}</td><td>{s.accepted}</td>"
        f"<td>{s.acceptance_length:.2f}</td></tr>"
        for s in trace.stretches
    )
    heads = ("Tokens", "Drafter", "Decided by", "Span", "Rounds", "Proposed", "Accepted", "Acceptance length")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    used = sorted({stretch.reason for stretch in trace.stretches} & REASONS.keys())
    meanings = "".join(f"<li><em>{reason}</em>: {REASONS[reason]}</li>" for reason in used)
    title = f"{count(len(trace.stretches), 'stretch', 'stretches')} in a table"
    return (
        f'<details><summary>{title}</summary><div class="table"><table>'
        f'<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div><ul class="note">{meanings}</ul></details>'
    )
