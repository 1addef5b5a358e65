"""Matchers: they accept a text from left to right and know its forced continuation, by SGLang's grammar engines.

Nothing here moves a request's own grammar: text accepted to look ahead is taken back, even after an error.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from whiflash_sglang.spans.vocabulary import Vocabulary, is_text

Encode = Callable[[str], Sequence[int]]
"""Text → token ids, without special tokens added."""

FORCED_TOKENS = 64
"""Number of tokens without a choice after which forced text counts as endless. xgrammar's own search for forced text
ends at a choice. A schema that requires itself, or `root ::= "a" root`, has none: that search would never end.
"""

MOST_WORDS = 512
"""Largest number of a mask's non-zero words whose tokens are compared. More of them hold a choice: no vocabulary has as
many tokens of which each begins the next.
"""


class Matcher(ABC):
    """A grammar in its state after a text.

    Everything accepted inside `trying` is taken back at its end. Each accepted token or text is recorded with its
    engine's steps, which engines take back. Code that moves the engine's own matcher makes a new object.

    Attributes:
        exhausted: whether no time is left, asked before each step; then nothing more is accepted or forced.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._goes_on: bool | None = None
        self.exhausted: Callable[[], bool] = lambda: False

    @contextmanager
    def trying(self, *, keeps: bool = False) -> Iterator[None]:
        """Return a context to look ahead in: on exit the matcher is back at its state on entry. May be nested.

        keeps: whether it is back after an error only.
        """
        before = len(self._steps)
        try:
            yield
            before = len(self._steps) if keeps else before
        finally:
            if steps := sum(self._steps[before:]):
                del self._steps[before:]
                self._rollback(steps)
                self._goes_on = None

    def accept_token(self, token: int) -> bool:
        """Advance by a token. Returns False, without a change, if the grammar forbids it or no time is left."""
        return self._took(self._accept_token(token) if self._may_go_on() else 0)

    def accept_text(self, text: str) -> bool:
        """Advance by a text, however it is cut into tokens. Returns False as `accept_token` does."""
        return self._took(self._accept_text(text) if self._may_go_on() else 0)

    def allows(self, text: str) -> bool:
        """Whether `text` may follow. The matcher does not advance."""
        steps = self._accept_text(text) if self._may_go_on() else 0
        if steps:
            self._rollback(steps)
        return bool(steps)

    def _took(self, steps: int) -> bool:
        if steps:
            self._steps.append(steps)
            self._goes_on = None
        return bool(steps)

    def _may_go_on(self) -> bool:
        """Whether the grammar has not ended, asked once per place, and time is left."""
        if self._goes_on is None:
            self._goes_on = not self.ended
        return self._goes_on and not self.exhausted()

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether no further token is accepted."""

    @property
    @abstractmethod
    def may_end(self) -> bool:
        """Whether a token that ends the text may follow."""

    @property
    def ends(self) -> bool:
        """Whether the text may end, and nothing is forced; False if no time is left."""
        return self.may_end and not self.forced() and not self.exhausted()

    def forced(self) -> str:
        """Return the text that must follow; empty if there is a choice, if it begins inside a character, or if no time
        is left.
        """
        return self._forced() if self._may_go_on() else ""

    @abstractmethod
    def _forced(self) -> str:
        """Return the text that must follow, for `forced`. The grammar has not ended, and time is left."""

    @abstractmethod
    def _accept_token(self, token: int) -> int:
        """Advance the engine by a token. Returns its steps; 0: the token is forbidden, and nothing changed."""

    @abstractmethod
    def _accept_text(self, text: str) -> int:
        """Advance the engine by a text. Returns its steps; 0: the text is forbidden, and nothing changed."""

    @abstractmethod
    def _rollback(self, steps: int) -> None: ...


class XGrammarMatcher(Matcher):
    """A matcher over an `xgrammar.GrammarMatcher`.

    Args:
        vocabulary: of the target; forced text is then searched token by token, at most `FORCED_TOKENS`. None: xgrammar
            searches, without a bound.
        size: number of token ids in the grammar's masks.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary | None = None, size: int = 0) -> None:
        super().__init__()
        self._matcher, self._vocabulary, self._size = matcher, vocabulary, size

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_terminated())

    @property
    def may_end(self) -> bool:
        return not self.ended and bool(self._matcher.is_completed())

    def _forced(self) -> str:
        endless = self._endless()
        if endless is not None:
            return endless.decode(errors="ignore")
        if self.exhausted():
            return ""  # without a choice, xgrammar's search has no end, and no time was left to find out
        try:
            return str(self._matcher.find_jump_forward_string())
        except UnicodeDecodeError:
            return ""

    def _endless(self) -> bytes | None:
        """Return the text of `FORCED_TOKENS` forced tokens; None if there is a choice among them."""
        if self._vocabulary is None:
            return None
        text = b""
        with self.trying():
            for _ in range(FORCED_TOKENS):
                token = None if self.may_end else self._only(self._vocabulary)
                if token is None or not self.accept_token(token):
                    return None
                text += self._vocabulary.token_bytes[token]
        return text

    def _only(self, vocabulary: Vocabulary) -> int | None:
        """Return the shortest token that may follow, if all others begin with its text; None if there is a choice.

        The text need not go on as they do: after `"` a `]` may follow, though `",` is a token and `"]` is not.
        """
        mask = _scratch(self._size)
        self._matcher.fill_next_token_bitmask(mask)
        words = mask[0]
        used = words.nonzero()[0]
        if len(used) > MOST_WORDS:
            return None
        best, shortest, longest = None, b"", b""
        for place, word in zip(used.tolist(), words.view(np.uint32)[used].tolist(), strict=True):
            for token in _bits(word, 32 * place):
                if not is_text(vocabulary, token):
                    continue
                text = vocabulary.token_bytes[token]
                if not text.startswith(longest) and not longest.startswith(text):
                    return None
                longest = max(longest, text, key=len)
                if best is None or len(text) < len(shortest):
                    best, shortest = token, text
        return best

    def _accept_token(self, token: int) -> int:
        return int(self._matcher.accept_token(token))

    def _accept_text(self, text: str) -> int:
        return int(self._matcher.accept_string(text))

    def _rollback(self, steps: int) -> None:
        self._matcher.rollback(steps)


@lru_cache(maxsize=1)
def _scratch(size: int) -> "np.ndarray[Any, np.dtype[np.int32]]":
    """Return a bit mask of `size` token ids, [1, words] int32. Each use overwrites it."""
    return np.zeros((1, -(-size // 32)), np.int32)


def _bits(word: int, first: int) -> Iterator[int]:
    """Yield `first` plus the number of each bit that is set."""
    while word:
        yield first + (word & -word).bit_length() - 1
        word &= word - 1


class GuidanceMatcher(Matcher):
    """A matcher over an `llguidance.LLMatcher`, which takes only tokens. encode: of its tokenizer."""

    def __init__(self, matcher: Any, encode: Encode) -> None:
        super().__init__()
        self._matcher, self._encode = matcher, encode

    @property
    def ended(self) -> bool:
        # A stopped matcher takes no token, not even the one that ends the text.
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    def _forced(self) -> str:
        try:
            return str(self._matcher.compute_ff_bytes().decode())
        except UnicodeDecodeError:
            return ""

    def _accept_token(self, token: int) -> int:
        return int(self._matcher.try_consume_tokens([token]))

    def _accept_text(self, text: str) -> int:
        tokens = list(self._encode(text))
        taken = int(self._matcher.try_consume_tokens(tokens))
        if taken < len(tokens):
            if taken:
                self._matcher.rollback(taken)
            return 0
        return taken

    def _rollback(self, steps: int) -> None:
        self._matcher.rollback(steps)


class Grammar(Protocol):
    """The constraint of one request, as its engine holds it.

    schema: the JSON that it was compiled from; empty if it was none. end: the token that ends a text under it; None:
    none does. begins: number of committed tokens, prompt included, before those that it constrains; None: it constrains
    nothing yet.
    """

    @property
    def schema(self) -> str: ...

    @property
    def end(self) -> int | None: ...

    @property
    def begins(self) -> int | None: ...

    def beginning(self, vocabulary: Vocabulary) -> Matcher | None:
        """Return a new matcher before any token; None if the engine has none.

        Args:
            vocabulary: of the target.
        """
        ...
