"""When a request copies from its prompt's forms: while a span is open in which text wears another dress.

Engine-free. The answer is followed as it is known where it is copied from, so the forms are those of the span that
the very next token belongs to.
"""

from collections.abc import Iterable, Sequence

from whiflash_sglang.lookup.forms import Forms
from whiflash_sglang.lookup.index import SuffixIndex
from whiflash_sglang.lookup.readings import pieces_of
from whiflash_sglang.spans.hints import SpanHint
from whiflash_sglang.spans.tracker import SpanTracker
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of

IN_JSON = frozenset({"tool_call", "json"})
"""Kinds of spans in which text is quoted in JSON strings, whatever else is open: a fence inside one is quoted too."""

DRESSED = IN_JSON | {"code"}
"""Kinds of spans that have forms. Prose repeats what it says as it stands."""

TAIL = 64
"""Tokens of what was written that tell what is being quoted, and what stands before its lines."""


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
        written = bytes_of(self._vocabulary, end).decode(errors="replace")
        self._open = (self._forms.text(written, inside_json=not kinds.isdisjoint(IN_JSON)),)

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
