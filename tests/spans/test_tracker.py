"""The tracker against a reference that sees the whole text at once, byte by byte."""

from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import sampled
from whiflash_sdk.hints import Kind, Span
from work import lines_run

from whiflash_sglang.spans.tracker import SpanTracker

FENCE = Span(kind="code", begin="```", end="```")


@dataclass(frozen=True)
class Interval:
    """A rule open from byte `opened` up to, but not at, byte `closed`."""

    opened: int
    closed: int


def intervals_on_whole_text(hint: Span, text: bytes) -> list[Interval]:
    found, at = [], 0
    opened = 0 if hint.open else None
    while at <= len(text):
        marker = hint.begin if opened is None else hint.end
        if marker is None:
            break
        encoded = marker.encode()
        if text[at : at + len(encoded)] != encoded:
            at += 1
            continue
        at += len(encoded)
        if opened is None:
            opened = at
        else:
            found.append(Interval(opened, at))
            opened = None
    if opened is not None:
        found.append(Interval(opened, len(text) + 1))
    return found


def check_spans(tracker: SpanTracker, hints: list[Span], pieces: list[bytes], length: int) -> None:
    """Compare with spans open after `length` tokens: where each opened, and minus its place among the hints."""
    text, seen = b"".join(pieces), len(b"".join(pieces[:length]))
    open_now = [
        (interval.opened, -index)
        for index, hint in enumerate(hints)
        for interval in intervals_on_whole_text(hint, text)
        if interval.opened <= seen < interval.closed
    ]
    assert tracker.span is (hints[-max(open_now)[1]] if open_now else None)


# Few characters, so that markers occur, overlap, contain and interrupt one another by chance.
CHARACTERS = "ab<é🙂"
MARKER = st.text(CHARACTERS, min_size=1, max_size=4)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Span], list[bytes], list[int]]:
    hints = []
    for kind in draw(st.lists(st.sampled_from(get_args(Kind)), max_size=4)):
        is_open = draw(st.booleans())
        begin = draw(st.none() | MARKER if is_open else MARKER)
        hints.append(
            Span(
                kind=kind,
                begin=begin,
                end=draw(st.none() | MARKER),
                open=is_open,
                prefer=draw(st.sampled_from(["ar", None])),
            )
        )
    text = draw(st.text(CHARACTERS, max_size=40)).encode()
    edges = sorted(place % (len(text) + 1) for place in draw(st.lists(st.integers(0, 200), max_size=30)))
    pieces = [text[a:b] for a, b in pairwise([0, *edges, len(text)])]
    rounds = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    return hints, pieces, rounds


def check_case(case: tuple[list[Span], list[bytes], list[int]]) -> None:
    hints, pieces, rounds = case
    tracker = SpanTracker(hints, pieces)
    at = turn = 0
    while at < len(pieces):
        step = rounds[turn % len(rounds)]
        tracker.push(range(at, min(at + step, len(pieces))))
        at, turn = min(at + step, len(pieces)), turn + 1
        check_spans(tracker, hints, pieces, at)
    replayed = SpanTracker(hints, pieces)
    replayed.push(range(len(pieces)))
    assert replayed.span is tracker.span


@pytest.mark.parametrize("examples", sampled([1_000, 10_000], 1_000))
def test_spans_equal_those_of_the_whole_text(examples: int) -> None:
    settings(max_examples=examples, deadline=None, derandomize=True)(given(cases())(check_case))()


def test_unknown_token_ids_count_as_tokens_without_bytes() -> None:
    tracker = SpanTracker([FENCE], [b"``", b"`"])
    tracker.push([0, -1, 2, 99, 1])
    assert (tracker.span, tracker.length) == (FENCE, 5)


def test_memory_is_one_marker_and_work_is_linear() -> None:
    table = [bytes((byte,)) for byte in b"ab<"]
    hints = [Span(kind="code", begin="a" * 63 + "<", end="b" * 64)] * 16

    def lines(tokens: int) -> int:
        tracker = SpanTracker(hints, table)

        def push() -> None:
            for _ in range(tokens // 4):
                tracker.push((0, 0, 1, 2))
                assert len(tracker._tail) <= 63

        return lines_run(push)

    small, large = lines(1_000), lines(8_000)
    assert large <= 8 * small
    assert large <= 8_000 * 60
