"""Contents for both renderers: the response cut at its stretches, its rounds one by one, and its totals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from textwrap import fill
from typing import Final, NamedTuple

from whiflash_sdk.trace import ArmTotals, Stretch, Trace

KNOWN_ARMS: Final = ("ar", "diffusion", "lookup", "structure", "none")
REASONS: Final = {
    "score": "most expected tokens for the time",
    "span": "most expected tokens for the time, after a preference or bias of a hint",
    "pin": "a hint demanded it",
    "off": "the request switched drafting off",
    "policy": "the order that the server's router puts the drafters in",
}
_CONTROLS: Final = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    # C1 controls also act on terminals, and direction overrides would show text in a wrong order.
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


class Turn(NamedTuple):
    """One response of a recorded conversation.

    title: what to call it, such as the request's last message.
    text: the response's text; not read if the trace is a full one, which has it.
    trace: its routing.
    model: which one answered, if that is known.
    """

    title: str
    text: str
    trace: Trace
    model: str | None = None


class Piece(NamedTuple):
    """A part of the text. stretch: the one that wrote it; None for text of no round, such as the prefill's token.

    number: of the stretch, from 1.
    """

    text: str
    stretch: Stretch | None = None
    span: str | None = None
    number: int = 0


SOURCES: Final = {
    "context": "the conversation and the answer so far",
    "prediction": "the answer that was predicted",
    "group": "other answers of the task",
    "grammar": "what a grammar forces or suggests",
    "tools": "what calls of the request's tools look like",
    "ar": "EAGLE-3",
    "diffusion": "a block drafter (DFlash, DSpark)",
}
"""Descriptions of the sources of drafts, by name."""


def pieces(turn: Turn) -> list[Piece]:
    """Cut the response at its stretches; it stays one piece if the trace has no offsets in this text."""
    stretches = turn.trace.stretches
    text = turn.text if turn.trace.text is None else turn.trace.text
    if stretches and all(s.chars is not None and s.chars[1] <= len(text) for s in stretches):
        return [piece for piece in _cut(text, stretches) if piece.text]
    return [Piece(text)] if text else []


def _cut(text: str, stretches: Sequence[Stretch]) -> Iterator[Piece]:
    """Cut `text` at the offsets of its stretches; text between two stretches of one span is part of that span."""
    end, span = 0, stretches[0].span
    for number, stretch in enumerate(stretches, 1):
        begin, after = stretch.chars or (end, end)
        yield Piece(text[end:begin], span=span if span == stretch.span else None)
        yield Piece(text[begin:after], stretch, stretch.span, number)
        end, span = max(end, after), stretch.span
    yield Piece(text[end:])


def by_author(piece: Piece) -> list[tuple[str, bool]]:
    """Cut the piece into accepted drafts (False) and the target's own tokens (True).

    It stays one piece if its rounds had no drafts, or if the trace has no lengths of rounds.
    """
    rounds = piece.stretch.round_chars if piece.stretch and piece.stretch.arm != "none" else None
    lengths = [length for both in rounds or () for length in both]
    if sum(lengths) != len(piece.text):
        return [(piece.text, False)]
    places = pairwise(accumulate(lengths, initial=0))
    return [(piece.text[a:b], bool(number % 2)) for number, (a, b) in enumerate(places) if b > a]


def printable(text: str) -> str:
    """Replace characters that no output should get: controls by pictures, misleading ones and surrogates by marks."""
    return text.translate(_CONTROLS).encode("utf-8", "replace").decode()


def in_order(names: Iterable[str]) -> list[str]:
    """Return drafters' names in order, each once: known drafters first."""
    distinct = set(names)
    return [arm for arm in KNOWN_ARMS if arm in distinct] + sorted(distinct.difference(KNOWN_ARMS))


def describe(stretch: Stretch) -> str:
    """Describe the figures of a stretch in one line."""
    facts = [count(stretch.tokens, "token"), count(stretch.rounds, "round")]
    facts.append(f"acceptance length {stretch.acceptance_length:.2f}")
    if stretch.proposed is not None:
        facts.append(f"{stretch.accepted} of {count(stretch.proposed, 'draft')} accepted")
    return " · ".join(facts)


def why(stretch: Stretch, before: Stretch | None) -> str:
    """Say why a stretch began, in one line: the change of drafter or of span, and the routing reason."""
    if before is None:
        sentence = f"Began with {stretch.arm}"
    elif before.arm != stretch.arm:
        sentence = f"Switched from {before.arm} to {stretch.arm}"
    else:
        sentence = f"Stayed with {stretch.arm}"
    span = before.span if before else None
    if stretch.span != span:
        sentence += f", {stretch.span} began" if stretch.span else f", {span} ended"
    if stretch.reason:
        sentence += f": {REASONS[stretch.reason]}" if stretch.reason in REASONS else f": by {stretch.reason}"
    return printable(sentence)


def summary(trace: Trace) -> str:
    """Summarise a response's figures in lines of at most 80 characters."""
    facts = [f"policy {trace.policy}", count(trace.tokens, "token"), count(trace.rounds, "round")]
    facts += [f"acceptance length {trace.acceptance_length:.2f}", count(trace.switches, "switch", "switches")]
    if trace.tokens_per_second is not None:
        facts.append(f"{trace.tokens_per_second:.1f} tokens a second")
    if trace.gain is not None:
        facts.append(f"estimated gain {trace.gain:.2f}×")
    whole = "\0· ".join(printable(fact).replace(" ", "\0") for fact in facts)
    return fill(whole, 80, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def everything(trace: Trace) -> ArmTotals:
    """Return the totals over all drafters."""
    sums = ArmTotals.sum(trace.arms.values())
    return sums.model_copy(update={"rounds": trace.rounds, "tokens": trace.tokens})


def reasons(trace: Trace) -> str:
    """List the number of rounds by routing reason, in one line."""
    counts = (f"{count(rounds, 'round')} by {reason}" for reason, rounds in trace.reasons.items())
    return printable(" · ".join(counts))


def held_back(trace: Trace) -> str:
    """Name the drafter whose rounds fell most tokens short of the mean, in one line; empty if all are near it."""
    missing = {arm: sums.rounds * trace.acceptance_length - sums.tokens for arm, sums in trace.arms.items()}
    arm = max(missing, key=missing.__getitem__, default="")
    if not arm or missing[arm] < 0.5:
        return ""
    sums = trace.arms[arm]
    sentence = f"{arm} took {sums.rounds} of {count(trace.rounds, 'round')}"
    sentence += f" for {sums.tokens} of {count(trace.tokens, 'token')}"
    if sums.proposed:
        sentence += f"; {sums.accepted} of its {count(sums.proposed, 'draft')} were accepted"
    return printable(f"Why not more: {sentence}.")


def seconds(saved: float | None) -> str:
    """Format an estimate of saved seconds; empty for None."""
    return "" if saved is None else f"{saved:.2f} s"


def count(number: int, singular: str, many: str = "") -> str:
    """Format a number with its noun in the singular or plural."""
    return f"{number} {singular if number == 1 else many or singular + 's'}"
