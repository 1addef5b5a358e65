"""Proposes tokens: text that a grammar forces, or that is likely, cut as the tokenizer cuts it."""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, cut_behind, is_text, text_of
from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.chances import SEED, Kind, LikelyText
from whiflash_sglang.structure.guesses import STEPS, Ahead, Guesses, likely
from whiflash_sglang.structure.layout import FREE, Layout
from whiflash_sglang.structure.matchers import Matcher

CHARS_PER_TOKEN = 8
"""Characters of text that are asked for, and cut into tokens, per token that may be proposed."""

TAIL = 6
"""Tokens at the text's end that are cut again with what follows, since a word may cross the seam."""

BREAKS = frozenset(bytes([code]) for code in range(128) if not chr(code).isalnum() and chr(code) != "'")
"""Characters that end a word or a number before them: tokenizers cut there, except in contractions."""


class Token(NamedTuple):
    """A token to propose. kinds: why; the least likely one counts. among: as in `LikelyText`, of the word that the
    token belongs to; empty: none.
    """

    token: int
    kinds: tuple[Kind, ...]
    among: tuple[str, ...] = ()


def sketch(
    vocabulary: Vocabulary,
    tail: Sequence[int],
    limit: int,
    *,
    matcher: Matcher | None = None,
    layout: Layout | None = None,
    calls: Calls | None = None,
    guesses: Guesses | None = None,
    end: int | None = None,
) -> list[Token]:
    """Return at most `limit` tokens, and the end, that are likely to follow a text, all allowed by its grammar.

    If a tool call is open, the continuation that its tools expect is taken if more of its tokens are expected right.

    For the grammar and for the calls, each: at most `STEPS` pieces are asked for; `limit` times `CHARS_PER_TOKEN`
    characters and the tail are cut; `limit` tokens are accepted and taken back.

    Args:
        tail: the text's last tokens. matcher, layout: of its grammar, after it. calls: of its request's tools, which
            forbid nothing. end: the token that ends a text; None: none is proposed.
    """
    chars = limit * CHARS_PER_TOKEN
    sources = [likely(Ahead(matcher, layout, guesses), chars)] if matcher is not None and layout is not None else []
    sources += [calls.pieces(chars, guesses)] if calls is not None else []
    best = list[Token]()
    for pieces in sources:
        tokens = cut(vocabulary, tail, pieces) if pieces else []
        # The last tokens of a text that goes on may be cut otherwise with what follows.
        complete = len(pieces) < STEPS and sum(len(each.text) for each in pieces) < chars and len(tokens) <= limit
        tokens = tokens if complete else tokens[: max(min(limit, len(tokens) - 2), 1)]
        if matcher is not None:
            tokens = _allowed(matcher, vocabulary, tokens, end if complete else None)
        best = max(best, tokens, key=_expected)
    return best


def _expected(tokens: Sequence[Token]) -> float:
    """Return how many of the tokens are expected to be right before anything was learned."""
    return sum(accumulate((min(map(SEED.__getitem__, token.kinds)) for token in tokens), operator.mul), 0.0)


def _allowed(matcher: Matcher, vocabulary: Vocabulary, tokens: list[Token], end: int | None) -> list[Token]:
    """Return the longest allowed beginning of `tokens`, and `end` after it if that is all and the text may end."""
    with matcher.trying():
        for number, (token, *_) in enumerate(tokens):
            if not (is_text(vocabulary, token) and matcher.accept_token(token)):
                return tokens[:number]
        if end is None or not matcher.ends:
            return tokens
        if matcher.allows(FREE):
            # The end of a stretch of structure may end the text; prose may end anywhere.
            return [*tokens, Token(end, (Kind.STOPPED,))] if tokens else []
        if tokens:
            # The whole text is known: nothing follows that a longer token could hold.
            kinds = {Kind.FORCED if kind is Kind.EDGE else kind for kind in tokens[-1].kinds}
            tokens = [*tokens[:-1], tokens[-1]._replace(kinds=tuple(kinds))]
        return [*tokens, Token(end, (Kind.END,))]


def cut(vocabulary: Vocabulary, tail: Sequence[int], pieces: Sequence[LikelyText]) -> list[Token]:
    """Cut the pieces' text into the tokens that the target would most likely use after `tail`.

    The tail's open word is cut again together with the text, since the parts of a word are cut otherwise than the
    whole. If no token begins at the seam, the text is cut by itself.
    """
    text = "".join(piece.text for piece in pieces)
    tokens = cut_behind(vocabulary, text_of(vocabulary, tail), text)
    first = Kind.FORCED
    if tokens is None:
        tokens, first = cut_behind(vocabulary, "", text), Kind.SEAM
    of_bytes = [piece for piece in pieces for _ in piece.text.encode()]
    chosen: list[Token] = []
    begin, table = 0, vocabulary.token_bytes
    for number, token in enumerate(tokens or ()):
        if token >= vocabulary.size:
            break  # a client's own marker may name such a token, and a forward with it would end the server
        stop = begin + len(table[token])
        ends = [first] * (number == 0) + [Kind.EDGE] * (number + 1 == len(tokens or ()))
        kinds = dict.fromkeys([*ends, *(piece.kind for piece in of_bytes[begin:stop])])
        chosen.append(Token(token, tuple(kinds), of_bytes[begin].among))
        begin = stop
    # The tokens before a word, as far back as the tokenizer may join them with it, depend on it too.
    for number in range(len(chosen) - 1, 0, -1):
        if not chosen[number - 1].among and table[chosen[number].token][:1] not in BREAKS:
            chosen[number - 1] = chosen[number - 1]._replace(among=chosen[number].among)
    return chosen


def open_word(vocabulary: Vocabulary, tail: Sequence[int]) -> Sequence[int]:
    """Return the end of `tail` that is tokenised again with the text after it: from the newest token after a word."""
    parts = [bytes_of(vocabulary, (token,)) for token in tail]
    for at in range(len(parts) - 1, 0, -1):
        if parts[at][:1] in BREAKS and parts[at - 1][-1:].isalnum():
            return tail[at:]
    return tail
