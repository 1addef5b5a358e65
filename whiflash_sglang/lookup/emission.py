"""When a request copies from its prompt's forms: while a span is open in which text wears another dress.

Engine-free. The answer is followed as it is known where it is copied from, so the forms are those of the span that
the very next token belongs to.
"""

import re
from collections.abc import Iterable, Sequence

from whiflash_sglang.lookup.forms import Forms
from whiflash_sglang.lookup.index import SuffixIndex
from whiflash_sglang.lookup.readings import pieces_of
from whiflash_sglang.spans.hints import SpanHint
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of

CALL, JSON, CODE = "tool_call", "json", "code"

DRESSED = frozenset({CALL, JSON, CODE})
"""Kinds of spans that have forms. Prose is repeated unchanged."""

OPENING = 64
"""Tokens of a call, at most, that show what its arguments are written in; if they do not, it is JSON."""

_ARGUMENTS = re.compile(r"([{\[])|<(?:｜DSML｜)?[A-Za-z]")
"""Their beginnings: a JSON document (or a list of Python's), or a tag; special tokens are none of these."""

TAIL = 64
"""Tokens of the output that show what is being quoted, and what precedes its lines."""


def has_forms(spans: Iterable[SpanHint]) -> bool:
    """Whether a span may open that has forms."""
    return any(span.kind in DRESSED for span in spans)


class Emission:
    """One request's.

    Args:
        vocabulary: of the target. spans: of the request. prompt: tokens of it. budget: as of `Forms`.
    """

    def __init__(self, vocabulary: Vocabulary, spans: Sequence[SpanHint], prompt: int, budget: int) -> None:
        self._vocabulary, self._prompt, self._budget = vocabulary, prompt, budget
        self._spans = SpanTracker(spans, vocabulary.token_bytes)
        self._forms: Forms | None = None
        self._open: Sequence[SuffixIndex] = ()
        # If a call is open from the first token on, that may be its marker.
        self._begins = next(
            (span.begin for span in spans if span.kind == CALL and span.open and span.begin), ""
        )
        self._call: int | None = None
        self._has_tags: bool | None = None

    def follow(self, text: SuffixIndex) -> None:
        """Prompt and answer have become `text`, of which earlier calls saw the beginning. Bounded work."""
        self._spans.push(text.tokens(self._prompt + self._spans.length, len(text)))
        kinds = self._spans.kinds
        self._open = ()
        if kinds.isdisjoint(DRESSED):
            return
        if self._forms is None:
            prompt = text.tokens(0, self._prompt)
            pieces = pieces_of(prompt, self._vocabulary.token_bytes, self._vocabulary.special)
            self._forms = Forms(self._vocabulary.encode, pieces, self._budget)
        end = text.tokens(max(self._prompt, len(text) - TAIL), len(text))
        # A fence inside a JSON string is quoted, too.
        inside_json = JSON in kinds or (CALL in kinds and not self._in_tags(text))
        self._open = (self._forms.text(self._text_of(end), inside_json=inside_json),)

    def _in_tags(self, text: SuffixIndex) -> bool:
        """Whether the call that is being written has its arguments between tags, as they are; else they are JSON."""
        began = self._spans.since(CALL)
        assert began is not None, "a call is open"
        if began != self._call:
            self._call, self._has_tags = began, None
        if self._has_tags is None:
            begin = self._prompt + began
            tokens = text.tokens(begin, min(begin + OPENING, len(text)))
            opening = self._text_of(tokens)
            in_marker = self._begins.startswith(opening)
            found = None if in_marker else _ARGUMENTS.search(opening.removeprefix(self._begins))
            if found is not None or len(tokens) == OPENING:
                self._has_tags = found is not None and found[1] is None
        return self._has_tags is True

    def _text_of(self, tokens: Sequence[int]) -> str:
        return bytes_of(self._vocabulary, tokens).decode(errors="replace")

    def texts(self) -> Sequence[SuffixIndex]:
        """Forms to copy from next; none where no span with forms is open."""
        return self._open

    @property
    def tokens(self) -> int:
        """Tokens of forms that were made."""
        return self._forms.tokens if self._forms is not None else 0

    @property
    def nbytes(self) -> int:
        """Bytes of their indexes."""
        return self._forms.nbytes if self._forms is not None else 0
