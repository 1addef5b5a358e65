"""Prompt lookup decoding: what followed the first earlier occurrence of the text's last n tokens.

Source: apoorvumang/prompt-lookup-decoding, as in `transformers` (`PromptLookupCandidateGenerator`) and vLLM's
`ngram`: the longest n-gram that occurs earlier decides, the earliest place of several, a fixed number of tokens is
copied.
"""

from collections.abc import Sequence

NGRAM = 3
TOKENS = 10
"""The published default: n from 3 down to 1, ten tokens."""


class PromptLookup:
    """One text that grows.

    Args:
        ngram: longest n-gram that is looked for, down to one token. tokens: most tokens that are copied.
    """

    def __init__(self, ngram: int = NGRAM, tokens: int = TOKENS) -> None:
        self._ngram, self._count = ngram, tokens
        self._text: list[int] = []
        # n-gram → where its first occurrence ends, exclusively; only of those that something follows.
        self._first: dict[tuple[int, ...], int] = {}

    @property
    def text(self) -> Sequence[int]:
        """All tokens so far."""
        return self._text

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            end = len(self._text)
            for n in range(1, min(self._ngram, end) + 1):
                self._first.setdefault(tuple(self._text[end - n :]), end)
            self._text.append(token)

    def propose(self) -> Sequence[int]:
        """What to draft after the text's end."""
        end = len(self._text)
        for n in range(min(self._ngram, end - 1), 0, -1):
            place = self._first.get(tuple(self._text[end - n :]))
            if place is not None:
                return self._text[place : place + self._count]
        return ()
