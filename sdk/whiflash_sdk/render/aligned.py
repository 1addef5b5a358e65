"""What both renderers show: the response cut at its stretches, its rounds one by one, its totals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from whiflash_sdk.trace import Stretch, Trace

KNOWN_ARMS: Final = ("ar", "diffusion", "lookup", "none")
_CONTROLS: Final = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    # C1 controls steer terminals too; direction overrides would show text in an order it does not have.
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


class Turn(NamedTuple):
    """One response of a recorded conversation.

    title: what to call it, such as the request's last message.
    text: the response's text; empty takes the stretches' own.
    trace: its routing.
    """

    title: str
    text: str
    trace: Trace


class Piece(NamedTuple):
    """A part of the text; `stretch` is None for what no round wrote, such as the prefill's token."""

    text: str
    stretch: Stretch | None
    span: str | None = None


class Round(NamedTuple):
    """One round: its drafter and the tokens it committed, a mean where the server sent no counts."""

    arm: str
    tokens: float


def pieces(turn: Turn) -> list[Piece]:
    """The response cut at its stretches; in one piece if the server could not cut it."""
    stretches = turn.trace.stretches
    if not stretches or any(stretch.text is None for stretch in stretches):
        return [Piece(turn.text, None)] if turn.text else []
    joined = "".join(stretch.text or "" for stretch in stretches)
    before, found, after = turn.text.partition(joined) if joined else (turn.text, "", "")
    if turn.trace.prefill_text is not None:
        before = turn.trace.prefill_text
    elif not found:  # parsed text, of a tool call for example, is not what was generated
        before = ""
    inner = [Piece(stretch.text or "", stretch, stretch.span) for stretch in stretches]
    # A span that is open at the first round opened at the start, or with the prefill's token.
    first = Piece(before, None, stretches[0].span)
    return [piece for piece in (first, *inner, Piece(after if found else "", None)) if piece.text]


def rounds(trace: Trace) -> Iterator[Round]:
    """Every round in order."""
    for stretch in trace.stretches:
        counts = stretch.round_tokens or (stretch.acceptance_length,) * stretch.rounds
        yield from (Round(stretch.arm, tokens) for tokens in counts)


def printable(text: str) -> str:
    """Text that any output takes: control characters as pictures, what misleads or is no text replaced."""
    return text.translate(_CONTROLS).encode("utf-8", "replace").decode()


def describe(stretch: Stretch) -> str:
    """A stretch in one line."""
    facts = [stretch.arm, _count(stretch.tokens, "token"), f"{_count(stretch.rounds, 'round')}"]
    facts.append(f"acceptance length {stretch.acceptance_length:.2f}")
    if stretch.reason:
        facts.append(f"by {stretch.reason}")
    if stretch.span:
        facts.append(f"in {stretch.span}")
    return printable(" · ".join(facts))


def summary(trace: Trace) -> str:
    """A response in one line."""
    facts = [f"policy {trace.policy}", _count(trace.tokens, "token"), _count(trace.rounds, "round")]
    facts += [
        f"acceptance length {trace.acceptance_length:.2f}",
        _count(trace.switches, "switch", "switches"),
    ]
    return printable(" · ".join(facts))


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
