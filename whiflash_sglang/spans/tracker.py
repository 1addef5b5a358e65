"""Tracker of the open span of a request's output, token by token.

Each span rule is followed independently (`tests/spans/test_tracker.py` checks this against a search of the whole text).
A closed rule opens after the next occurrence of its begin marker; an open rule closes after the next occurrence of its
end marker; occurrences within one rule do not overlap. Repeated begin markers do not nest within one rule, so a marker
quoted inside a string can end a span early but never keep it open past its next end. Different rules nest and overlap
freely, and the active span is the one that opened last.

Markers are matched on bytes, because a token may end inside a marker and inside a character. Each push searches its own
bytes and the few before them that could start a marker: time is linear in the output, and memory is one marker's
length.
"""

from collections.abc import Iterable, Sequence

from whiflash_sdk.hints import Span


class _Rule:
    """State of one span: whether it is open, and where its next marker may begin. Offsets count output bytes."""

    __slots__ = ("begin", "end", "next_from", "opened_at")

    def __init__(self, span: Span) -> None:
        self.begin = span.begin.encode() if span.begin else None
        self.end = span.end.encode() if span.end else None
        self.next_from = 0  # where the next occurrence may begin
        self.opened_at: int | None = 0 if span.open else None

    def advance(self, data: bytes, base: int) -> None:
        """Open and close the span at the markers in `data`, which starts at offset `base`."""
        while (marker := self.begin if self.opened_at is None else self.end) is not None:
            at = data.find(marker, max(self.next_from - base, 0))
            if at < 0:
                break
            self.next_from = base + at + len(marker)
            self.opened_at = self.next_from if self.opened_at is None else None


class SpanTracker:
    """Follows one request's committed output tokens.

    A retracted request is rebuilt by a new tracker and one push of all its output tokens.

    spans: of two that open together, the first is active. token_bytes: bytes of every token id, from
    `spans.vocabulary.token_bytes`.
    """

    def __init__(self, spans: Sequence[Span], token_bytes: Sequence[bytes]) -> None:
        self._spans = spans
        self._rules = [_Rule(span) for span in spans]
        self._token_bytes = token_bytes
        markers = [marker for rule in self._rules for marker in (rule.begin, rule.end) if marker]
        self._keep = max(map(len, markers), default=1) - 1
        self._tail = b""
        self._bytes = 0
        self._length = 0

    def push(self, token_ids: Iterable[int]) -> None:
        """Follow committed output tokens. Ids outside the vocabulary (an engine's padding) have no bytes."""
        table = self._token_bytes
        pieces = [table[token] if 0 <= token < len(table) else b"" for token in token_ids]
        data = self._tail + b"".join(pieces)
        base = self._bytes - len(self._tail)
        for rule in self._rules:
            rule.advance(data, base)
        self._bytes = base + len(data)
        self._length += len(pieces)
        self._tail = data[max(len(data) - self._keep, 0) :]

    @property
    def length(self) -> int:
        """Number of output tokens so far."""
        return self._length

    @property
    def span(self) -> Span | None:
        """Return the open span that opened last; None if all are closed."""
        active, latest = None, -1
        for span, rule in zip(self._spans, self._rules, strict=True):
            if rule.opened_at is not None and rule.opened_at > latest:
                active, latest = span, rule.opened_at  # `>`: of spans opened together the first is active
        return active
