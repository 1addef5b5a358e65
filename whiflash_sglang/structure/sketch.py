"""The next tokens that a grammar forces: the text that is known, cut as the target would cut it."""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, is_text
from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.chances import REASONS, Cuts, Kind, LikelyText
from whiflash_sglang.structure.guesses import FREE, Guesses, Likelihood, is_whole, likely
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import Matcher

NOTHING = -1
"""Before the first token of a text."""

CHARS_PER_TOKEN = 16
"""Characters that are cut into tokens for each token that may be proposed."""

TAIL = 6
"""Tokens of what was written that are cut together with what follows: pieces of words meet at the seam."""


class Token(NamedTuple):
    """One token to propose, and why. usual: the one that the tokenizer has in its place; None: itself."""

    token: int
    kind: Kind
    usual: int | None = None


def sketch(
    matcher: Matcher | None,
    vocabulary: Vocabulary,
    tail: Sequence[int],
    limit: int,
    *,
    end: int | None,
    likelihood: Likelihood,
    layout: Layout,
    cuts: Cuts,
    guesses: Guesses | None = None,
    calls: Calls | None = None,
) -> tuple[list[Token], bool]:
    """At most `limit` tokens that are likely to follow what the matcher has accepted, all of them allowed by it; and
    whether nothing is known behind them.

    If a call is open, its tools expect more, and the matcher allows it, that is taken.

    Work, for each of the two: at most `STEPS` pieces are asked for, `limit` times `CHARS_PER_TOKEN` characters and the
    tail are cut (of text that was cut otherwise before, what is behind such a place again, `chances.MOST` times),
    `limit` tokens accepted and taken back.

    Args:
        tail: the last tokens that were accepted. end: the token that ends a text; None: none is proposed.
        likelihood: of a kind; the least likely one of a token's reasons is its kind. guesses: what follows where
            nothing is forced; layout: of the text so far, for them. calls: of the request's tools, which forbid
            nothing. cuts: how such text was cut before.
    """
    chars = limit * CHARS_PER_TOKEN
    sources: list[list[LikelyText]] = []
    if matcher is not None:
        sources.append(likely(matcher, chars, guesses, layout, likelihood))
    if calls is not None:
        sources.append(calls.pieces(chars, guesses, likelihood))
    best: list[Token] = []
    whole = True
    for pieces in sources:
        tokens = cut(vocabulary, tail, pieces, likelihood, cuts, limit + 1) if pieces else []
        whole &= len(tokens) <= limit and is_whole(pieces, chars, likelihood)
        tokens = tokens[:limit]
        if matcher is not None:
            tokens = _allowed(matcher, vocabulary, tokens, limit, end)
        best = max(best, tokens, key=lambda option: _expected(option, likelihood)) if best else tokens
    return best, whole


def _expected(tokens: Sequence[Token], likelihood: Likelihood) -> float:
    """How many of them are right."""
    return sum(accumulate((likelihood(token.kind) for token in tokens), operator.mul), 0.0)


def _allowed(
    matcher: Matcher, vocabulary: Vocabulary, tokens: Sequence[Token], limit: int, end: int | None
) -> list[Token]:
    """The first of `tokens` that the matcher allows, and `end` behind them where the text is complete then."""
    with matcher.trying():
        allowed = [*tokens[: accepted(matcher, vocabulary, [token.token for token in tokens])]]
        if len(allowed) < len(tokens):
            return allowed
        if end is not None and len(allowed) < limit and matcher.may_end and not matcher.forced():
            if matcher.allows(FREE):
                # The end of a stretch of structure may end the text; prose may end anywhere.
                return [*allowed, Token(end, Kind.STOPPED)] if allowed else []
            if allowed and allowed[-1].kind is Kind.EDGE:
                # The whole text is known: nothing follows that a longer token could hold.
                allowed[-1] = allowed[-1]._replace(kind=Kind.FORCED)
            allowed.append(Token(end, Kind.END))
    return allowed


def accepted(matcher: Matcher, vocabulary: Vocabulary, tokens: Sequence[int], *, at_once: bool = True) -> int:
    """How many of the tokens the matcher allows; it goes on with them. at_once: it is asked for all of them first."""
    text = whole_text(vocabulary, tokens) if at_once else ""
    if text and matcher.accept_text(text):
        return len(tokens)
    for number, token in enumerate(tokens):
        if not (is_text(vocabulary, token) and matcher.accept_token(token)):
            return number
    return len(tokens)


def cut(
    vocabulary: Vocabulary,
    tail: Sequence[int],
    pieces: Sequence[LikelyText],
    likelihood: Likelihood,
    cuts: Cuts,
    limit: int,
) -> list[Token]:
    """The pieces' text in the tokens that the target would most likely use behind `tail`, the first `limit` of them.

    The tail is cut again together with the text, since a word that it leaves open is cut otherwise alone; where no
    token begins at the seam, the text is cut by itself.
    """
    key = *tail[-TAIL:], *pieces
    reasons = cuts.reasons.pop(key, None)
    if reasons is None:
        reasons = _reasons(vocabulary, tail, pieces, cuts)
        if len(cuts.reasons) >= REASONS:
            cuts.reasons.popitem(last=False)
    cuts.reasons[key] = reasons
    return [
        token if kinds is None else Token(token.token, min(kinds, key=likelihood), token.usual)
        for token, kinds in reasons[:limit]
    ]


def _reasons(
    vocabulary: Vocabulary, tail: Sequence[int], pieces: Sequence[LikelyText], cuts: Cuts
) -> list[tuple[Token, Sequence[Kind] | None]]:
    """Tokens of `cut`, and the kinds of each; None: it is of that kind only."""
    text = "".join(piece.text for piece in pieces)
    written = text_of(vocabulary, tail[-TAIL:])
    tokens = cuts.usual(vocabulary, written, text)
    first = Kind.FORCED
    if tokens is None:
        tokens, first = cuts.usual(vocabulary, "", text), Kind.SEAM
    if not tokens:
        return []
    before = tail[-1] if tail else NOTHING
    pairs = cuts.applied(vocabulary, before, tokens)
    bounds = list(accumulate(len(piece.text.encode()) for piece in pieces))
    chosen: list[tuple[Token, Sequence[Kind] | None]] = []
    piece = begin = 0
    for number, (token, usual) in enumerate(pairs):
        stop = begin + len(vocabulary.token_bytes[token])
        while bounds[piece] <= begin:
            piece += 1
        if stop <= bounds[piece] and 0 < number < len(pairs) - 1:
            reason = Token(token, pieces[piece].kind, None if usual == token else usual)
            chosen.append((reason, None))
            begin = stop
            continue
        last = piece
        while bounds[last] < stop:
            last += 1
        kinds = [inside.kind for inside in pieces[piece : last + 1]]
        if number == len(pairs) - 1:
            kinds.insert(0, Kind.EDGE)
        if number == 0:
            kinds.insert(0, first)
        reason = Token(token, kinds[0], None if usual == token else usual)
        chosen.append((reason, kinds if len(kinds) > 1 else None))
        begin = stop
    return chosen


def whole_text(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    """The text of tokens; empty where it begins or ends inside a character, or where one of them is none."""
    table = vocabulary.token_bytes
    parts = [table[token] for token in tokens if 0 <= token < len(table)]
    text = (data := b"".join(parts)).decode(errors="ignore")
    are_text = len(parts) == len(tokens) and all(parts) and vocabulary.special.isdisjoint(tokens)
    return text if are_text and len(text.encode()) == len(data) else ""


def text_of(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    """The end of the text of tokens, from the first character that is whole; empty where the last one is not."""
    data = bytes_of(vocabulary, tokens)
    begin = 0
    while begin < len(data) and data[begin] & 0xC0 == 0x80:
        begin += 1
    try:
        return data[begin:].decode()
    except UnicodeDecodeError:
        return ""
