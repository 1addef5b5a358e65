"""The HTML page: one file, no script, nothing loaded; text from the model is data and stays it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from whiflash_sdk.render.aligned import (
    KNOWN_ARMS,
    Piece,
    Turn,
    describe,
    everything,
    pieces,
    printable,
    reasons,
    rounds,
    summary,
)
from whiflash_sdk.trace import ArmTotals, Trace

# No script may run and nothing may be fetched, whatever the text says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_INTRODUCTION = """Colour shows which drafter proposed the text. In every round one drafter proposes a few tokens and
the model checks them in one pass: it keeps those that it would have written itself and adds one of its own.
<strong>Acceptance length</strong> is tokens per round; without a drafter it is 1. Point at a stretch of text, or go to
it with Tab, to see its figures."""
_ARMS = {
    "ar": "EAGLE-3: one token after another",
    "diffusion": "DFlash: a block of tokens at once",
    "lookup": "copied from the context",
    "none": "no draft: plain decoding",
}
_UNCOLOURED = {
    False: 'The trace is a summary; one asked for with trace="full" says which text is whose.',
    True: "The trace does not say where its stretches are in the text, so the text is not coloured.",
}
_REASONS = {
    "score": "most expected tokens for the time",
    "span": "the same, after a preference or bias of a hint",
    "pin": "a hint demanded it",
    "off": "the request switched drafting off",
    "policy": "the order that the server's router puts the drafters in",
}


def html(trace: Trace, text: str = "", *, title: str = "Response") -> str:
    """A page that shows one response. See `conversation_html`."""
    return conversation_html([Turn(title, text, trace)], title=title)


def conversation_html(turns: Sequence[Turn], *, title: str = "WhiFlash trace") -> str:
    """A self-contained page: each response coloured by drafter, its rounds as a strip, spans bracketed, totals.

    Works without network and script, by keyboard (Tab walks the stretches), in light and dark.
    """
    style = files("whiflash_sdk.render").joinpath("page.css").read_text("utf-8")
    sections = "\n".join(_section(turn, number) for number, turn in enumerate(turns, 1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{_safe(title)}</h1>
<p>{_INTRODUCTION}</p>
{_legend(turns)}
{sections}
</main>
</body>
</html>
"""


def figures(trace: Trace) -> str:
    """What a trace counts, as a part of somebody else's page: no style, no script, nothing loaded."""
    return f"<div><p>{_safe(summary(trace))}</p>{_totals(trace)}{_stretches(trace)}</div>"


def _safe(text: str) -> str:
    return escape(printable(text))


def _class(arm: str) -> str:
    return f"arm-{arm}" if arm in KNOWN_ARMS else "arm-other"


def _legend(turns: Sequence[Turn]) -> str:
    used = {arm for turn in turns for arm in turn.trace.arms}
    names = [arm for arm in KNOWN_ARMS if arm in used] + sorted(used.difference(KNOWN_ARMS))
    entries = [
        f'<span class="stretch {_class(arm)}">{_safe(arm)}</span> {_ARMS.get(arm, "")}'.rstrip()
        for arm in names
    ]
    entries.append('<span class="edge">[kind … kind]</span> span: tool call, JSON, code, reasoning')
    return (
        f'<ul class="legend" aria-label="Drafters">{"".join(f"<li>{entry}</li>" for entry in entries)}</ul>'
    )


def _section(turn: Turn, number: int) -> str:
    return f"""<section aria-labelledby="turn-{number}">
<h2 id="turn-{number}">{number}. {_safe(turn.title)}</h2>
<p>{_safe(summary(turn.trace))}</p>
{_text(turn)}
{_strip(turn.trace)}
{_totals(turn.trace)}
{_stretches(turn.trace)}
</section>"""


def _text(turn: Turn) -> str:
    parts = pieces(turn)
    note = ""
    if parts and all(part.stretch is None for part in parts):
        note = f'<p class="note">{_UNCOLOURED[bool(turn.trace.stretches)]}</p>'
    body = "".join(_spans(parts))
    return f'{note}<div class="text" role="group" aria-label="Response text">{body}</div>'


def _spans(parts: Sequence[Piece]) -> Iterator[str]:
    """Stretches, with a bracket around neighbours in the same span."""
    for kind, group in groupby(parts, key=lambda part: part.span):
        inner = "".join(map(_piece, group))
        if kind:
            name = _safe(kind)
            inner = f'<span class="edge">[{name} </span>{inner}<span class="edge"> {name}]</span>'
        yield inner


def _piece(part: Piece) -> str:
    text = f"<bdi>{_safe(part.text)}</bdi>"
    if part.stretch is None:
        return f'<span class="unrouted">{text}</span>'
    tip = f'<span class="tip" role="note">{escape(describe(part.stretch))}</span>'
    return f'<span class="stretch {_class(part.stretch.arm)}" tabindex="0">{text}{tip}</span>'


def _strip(trace: Trace) -> str:
    found = list(rounds(trace))
    if not found:
        return ""
    longest = max(entry.tokens for entry in found) or 1
    bars = "".join(
        f'<i class="{_class(entry.arm)}" style="height:{max(entry.tokens / longest, 0.02):.1%}"'
        f' title="round {index}: {_safe(entry.arm)}, {entry.tokens:g} tokens"></i>'
        for index, entry in enumerate(found, 1)
    )
    label = f"One bar a round: tokens committed by each of {len(found)}, at most {longest:g}"
    return (
        f'<figure><figcaption>{label}</figcaption><div class="strip" role="img" tabindex="0"'
        f' aria-label="{label}; mean {trace.acceptance_length:.2f}">{bars}</div></figure>'
    )


def _totals(trace: Trace) -> str:
    rows = [(arm, trace.arms[arm]) for arm in sorted(trace.arms, key=lambda arm: -trace.arms[arm].tokens)]
    body = "".join(_row(arm, totals, trace.tokens) for arm, totals in rows)
    total = _row("all", everything(trace), trace.tokens)
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("Drafter", "Rounds", "Tokens", "Share", "Acceptance length", "Drafts accepted")
    )
    return (
        f"<table><caption>Totals</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody><tfoot>{total}</tfoot></table>"
    )


def _row(arm: str, totals: ArmTotals, tokens: int) -> str:
    share = totals.tokens / tokens if tokens else 0.0
    drafts = "" if totals.proposed is None else f"{totals.accepted} of {totals.proposed}"
    cells = (totals.rounds, totals.tokens, f"{share:.0%}", f"{totals.acceptance_length:.2f}", drafts)
    return f'<tr><th scope="row">{_safe(arm)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _stretches(trace: Trace) -> str:
    if not trace.stretches:
        return f'<p class="note">{_safe(reasons(trace))}</p>' if trace.reasons else ""
    rows = "".join(
        f"<tr><td>{s.start}–{s.end}</td><td>{_safe(s.arm)}</td><td>{_safe(s.reason)}</td><td>{_safe(s.span or '')}</td>"
        f"<td>{s.rounds}</td><td>{s.accepted}</td><td>{s.acceptance_length:.2f}</td></tr>"
        for s in trace.stretches
    )
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("Tokens", "Drafter", "Decided by", "Span", "Rounds", "Accepted", "Acceptance length")
    )
    used = sorted({stretch.reason for stretch in trace.stretches} & _REASONS.keys())
    meanings = "".join(f"<li><em>{reason}</em>: {_REASONS[reason]}</li>" for reason in used)
    return (
        f"<details><summary>Stretches</summary><table><thead><tr>{heads}</tr></thead>"
        f'<tbody>{rows}</tbody></table><ul class="note">{meanings}</ul></details>'
    )
