"""Which span of the output is open, followed token by token.

Meaning (the whole text is its own reference, see `tests/spans/test_tracker.py`): every span rule is
followed by itself. Closed, it opens after the next occurrence of its begin marker; open, it closes
after the next occurrence of its end marker; occurrences taken by one rule do not overlap. Repeated
begins do not nest within one rule, so a marker quoted inside a string can end a span early but never
keep it open past its next end. Different rules nest and overlap freely, and the active one is the one
that opened last.

Markers are matched on bytes, because a token may end inside a marker and inside a character. Each
push searches its own bytes and the few before them that could start a marker: time is linear in the
output, and memory is one marker's length.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from whiflash_sglang.spans.hints import Bias, SpanHint


@dataclass(frozen=True, slots=True)
class SpanState:
    """The span that output token `length` would be written into.

    kind: kind of the active span; None outside all spans.
    depth: number of open spans.
    since_position: output tokens committed when the active span opened; `length` outside all spans.
    prefer, pin, bias: the active span's wishes, see `SpanHint`.
    length: committed output tokens this state was true at.
    """

    kind: str | None
    depth: int
    since_position: int
    prefer: str | None
    pin: bool
    bias: Bias
    length: int


class _Rule:
    """One span hint's progress through the output; offsets count output bytes."""

    __slots__ = ("begin", "end", "hint", "next_from", "opened_at", "since_position")

    def __init__(self, hint: SpanHint) -> None:
        self.hint = hint
        self.begin = hint.begin.encode() if hint.begin else None
        self.end = hint.end.encode() if hint.end else None
        self.next_from = 0  # where the next occurrence may begin
        self.opened_at: int | None = 0 if hint.open else None
        self.since_position = 0

    def advance(self, data: bytes, base: int) -> bool:
        """Follow `data`, which starts at offset `base`; True if the rule opened in it and is still open."""
        opened = False
        while (marker := self.begin if self.opened_at is None else self.end) is not None:
            found = data.find(marker, max(self.next_from - base, 0))
            if found < 0:
                break
            self.next_from = base + found + len(marker)
            opened = self.opened_at is None
            self.opened_at = self.next_from if opened else None
        return opened


class SpanTracker:
    """Follows one request's committed output tokens.

    A retracted request is rebuilt by a new tracker and one push of all its output tokens.

    spans: the request's rules, in its order.
    token_bytes: bytes of every token id, from `spans.vocabulary.token_bytes`.
    """

    def __init__(self, spans: Sequence[SpanHint], token_bytes: Sequence[bytes]) -> None:
        self._rules = [_Rule(hint) for hint in spans]
        self._token_bytes = token_bytes
        markers = [marker for rule in self._rules for marker in (rule.begin, rule.end) if marker]
        self._keep = max(map(len, markers), default=1) - 1
        self._tail = b""
        self._bytes = 0
        self._length = 0

    def push(self, token_ids: Iterable[int]) -> None:
        """Commit output tokens. Ids outside the vocabulary (an engine's padding) count as no bytes."""
        table = self._token_bytes
        pieces = [table[token] if 0 <= token < len(table) else b"" for token in token_ids]
        data = self._tail + b"".join(pieces)
        base = self._bytes - len(self._tail)
        ends: list[int] = []
        for rule in self._rules:
            if rule.advance(data, base) and rule.opened_at is not None:
                ends = ends or list(accumulate(map(len, pieces), initial=self._bytes))
                rule.since_position = self._length + bisect_left(ends, rule.opened_at)
        self._bytes = base + len(data)
        self._length += len(pieces)
        self._tail = data[max(len(data) - self._keep, 0) :]

    @property
    def length(self) -> int:
        """Output tokens committed so far."""
        return self._length

    @property
    def state(self) -> SpanState:
        """The open span after everything pushed so far."""
        active: _Rule | None = None
        depth, latest = 0, -1
        for rule in self._rules:
            if rule.opened_at is not None:
                depth += 1
                if rule.opened_at > latest:  # strictly: of spans opened together the first listed is active
                    active, latest = rule, rule.opened_at
        if active is None:
            return SpanState(None, 0, self._length, None, False, (), self._length)
        hint = active.hint
        return SpanState(
            hint.kind, depth, active.since_position, hint.prefer, hint.pin, hint.bias, self._length
        )
