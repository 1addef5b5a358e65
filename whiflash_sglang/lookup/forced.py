"""What a grammar forces next, in the tokens that the target would use (xgrammar's jump-forward strings).

Engine-free: a matcher is xgrammar's, a tokenizer a function from text to token ids. Text is what a grammar forces;
how it is cut into tokens is not, so the canonical tokens of the forced text are proposed, and of these only what the
matcher takes: a draft that the grammar forbids would be rejected by the target's mask anyway, and never be right.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

Encode = Callable[[str], Sequence[int]]

CHARS_PER_TOKEN = 16
"""Characters of forced text that are tokenised for each token that may be proposed."""


class Matcher(Protocol):
    """What is needed of `xgrammar.GrammarMatcher`."""

    def find_jump_forward_string(self) -> str: ...

    def accept_token(self, token_id: int) -> bool: ...

    def rollback(self, num_tokens: int = 1) -> None: ...

    def is_terminated(self) -> bool: ...


def forced_tokens(matcher: Matcher, encode: Encode, limit: int) -> list[int]:
    """At most `limit` tokens that continue what the matcher has accepted, all of them allowed; none where the grammar
    leaves a choice. The matcher is as it was.

    Bounded: `limit` times `CHARS_PER_TOKEN` characters are tokenised, `limit` tokens accepted and taken back.

    Args:
        matcher: that has accepted the text so far. encode: text → token ids, without special tokens.
    """
    if limit < 1 or matcher.is_terminated():
        return []
    try:
        text = matcher.find_jump_forward_string()[: limit * CHARS_PER_TOKEN]
    except UnicodeDecodeError:  # inside a character: what is forced is no text
        return []
    taken: list[int] = []
    for token in encode(text)[:limit] if text else ():
        if matcher.is_terminated() or not matcher.accept_token(token):
            break
        taken.append(token)
    if taken:
        matcher.rollback(len(taken))
    return taken
