"""The place of a text in an agent's work: tenant → agent → block, and the query beside them.

An agent's answers repeat themselves block by block: its plans resemble its plans, its calls its calls (AgentSpec, arXiv
2608.24004, keeps n-grams of every agent, query and block apart). Here the nearest texts are searched first and wider
ones after them, never beyond the tenant.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from whiflash_sglang.lookup.index import GAP
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.spans.tracker import Markers, MarkerTracker

LEAD = 8
"""Tokens before a block that are kept with it at most: what its beginning is found by. None is of another block, so
that who forgets that one forgets all of it.
"""


class Scope(NamedTuple):
    """A text's place inside a tenant. block: begin marker of a block, or the kind of a span; None: outside all."""

    agent: str | None = None
    query: str | None = None
    block: str | None = None

    def distance(self, other: "Scope") -> tuple[bool, bool, bool]:
        """How far another place is; the smaller the nearer."""
        return self.agent != other.agent, self.block != other.block, self.query != other.query


WHOLE = Scope()
"""The scope of requests that name none."""


class Blocks:
    """The blocks of one request's output: those of its hints' structure, else its spans.

    Args:
        hints: of the request. token_bytes: bytes of every token id; empty where there is no tokenizer, and so no
            blocks.
    """

    def __init__(self, hints: RequestHints, token_bytes: Sequence[bytes]) -> None:
        self._scope = Scope(hints.agent, hints.query)
        found = [(block.begin, Markers(*block)) for block in hints.structure] or [
            (span.kind, Markers(span.begin, span.end, span.open)) for span in hints.spans
        ]
        self.names: tuple[str, ...] = tuple(name for name, _ in found) if token_bytes else ()
        self._markers = [markers for _, markers in found] if token_bytes else []
        self._token_bytes = token_bytes
        self._restart()

    def _restart(self) -> None:
        self._tracker = MarkerTracker(self._markers, self._token_bytes)
        self._written: list[int] = []
        self._runs = [(self._open(), 0)]

    @property
    def scope(self) -> Scope:
        """Kind of the next token."""
        return self._runs[-1][0]

    def _open(self) -> Scope:
        active = self._tracker.active
        return self._scope if active is None else self._scope._replace(block=self.names[active])

    def follow(self, tokens: Sequence[int]) -> None:
        """The output goes on with these."""
        if not self.names:
            return
        for token in tokens:
            self._tracker.push((token,))
            self._written.append(token)
            if (now := self._open()) != self.scope:
                self._runs.append((now, len(self._written)))

    def parts(self, output: Sequence[int]) -> list[tuple[Scope, Sequence[int]]]:
        """A whole output, cut where blocks begin and end; with a block the few tokens before it that are in no other.

        `output` may be another one than was followed: what a retracted request wrote is not followed again.
        """
        written = len(self._written)
        if list(output[:written]) != self._written:
            self._restart()
            written = 0
        self.follow(output[written:])
        ends = [*(start for _, start in self._runs[1:]), len(output)]
        found: list[tuple[Scope, Sequence[int]]] = []
        own = 0  # where what is in no other block begins
        for (scope, start), end in zip(self._runs, ends, strict=True):
            if end > start:
                found.append((scope, output[max(start - LEAD, own) : end]))
            own = start if scope.block is None else end
        return found

    def texts(self, output: Sequence[int]) -> Mapping[Scope, Sequence[int]]:
        """`parts` of the same scope put together, with gaps between them: one text for a block that opens often."""
        found: dict[Scope, list[int]] = {}
        for scope, part in self.parts(output):
            text = found.setdefault(scope, [])
            text.extend((GAP, *part) if text else part)
        return found


def blocks_of(hints: RequestHints, token_bytes: Sequence[bytes]) -> Blocks | None:
    """None where a request says nothing of where it belongs."""
    if hints.agent is None and hints.query is None and not hints.structure:
        return None
    return Blocks(hints, token_bytes)
