"""The next tokens that a grammar forces: the text that is known, cut as the target would cut it."""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, cut_behind, text_of
from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.chances import REASONS, Cuts, Kind, LikelyText
from whiflash_sglang.structure.guesses import FREE, Ahead, Guesses, Likelihood, is_whole, likely

NOTHING = -1
"""Before the first token of a text."""

CHARS_PER_TOKEN = 16
"""Characters that are cut into tokens for each token that may be proposed."""

TAIL = 6
"""Tokens of what was written that are cut together with what follows: pieces of words meet at the seam."""

BREAKS = frozenset(bytes([code]) for code in range(128) if not chr(code).isalnum() and chr(code) != "'")
"""Characters that end a word or a number before them: tokenizers part texts there, but for contractions."""


class Token(NamedTuple):
    """One token to propose, and why. usual: the one that the tokenizer has in its place; None: itself."""

    token: int
    kind: Kind
    usual: int | None = None


def sketch(
    ahead: Ahead | None,
    vocabulary: Vocabulary,
    tail: Sequence[int],
    limit: int,
    *,
    end: int | None,
    likelihood: Likelihood,
    cuts: Cuts,
    guesses: Guesses | None = None,
    calls: Calls | None = None,
) -> tuple[list[Token], bool]:
    """At most `limit` tokens that are likely to follow a text, all of them allowed by its grammar; and whether nothing
    is known behind them.

    If a call is open, its tools expect more, and the grammar allows it, that is taken.

    Work, for each of the two: at most `STEPS` pieces are asked for, `limit` times `CHARS_PER_TOKEN` characters and the
    tail are cut (of text that was cut otherwise before, what is behind such a place again, `chances.MOST` times),
    `limit` tokens accepted and taken back.

    Args:
        ahead: at the end of the text; left as it is. None: no grammar constrains it. tail: the last tokens of it.
        end: the token that ends a text; None: none is proposed. likelihood: of a kind; the least likely one of a
            token's reasons is its kind. calls: of the request's tools, which forbid nothing; guesses: for them.
        cuts: how such text was cut before.
    """
    chars = limit * CHARS_PER_TOKEN
    sources = [likely(ahead.fork(), chars, likelihood)] if ahead is not None else []
    sources += [calls.pieces(chars, guesses, likelihood)] if calls is not None else []
    best, whole = list[Token](), True
    for pieces in sources:
        tokens = cut(vocabulary, tail, pieces, likelihood, cuts, limit + 1) if pieces else []
        whole &= len(tokens) <= limit and is_whole(pieces, chars, likelihood)
        tokens = tokens[:limit]
        if ahead is not None:
            tokens = _allowed(ahead.fork(), vocabulary, tokens, limit, end)
        best = max(best, tokens, key=lambda option: _expected(option, likelihood)) if best else tokens
    return best, whole


def _expected(tokens: Sequence[Token], likelihood: Likelihood) -> float:
    """How many of them are right."""
    return sum(accumulate((likelihood(token.kind) for token in tokens), operator.mul), 0.0)


def _allowed(
    ahead: Ahead, vocabulary: Vocabulary, tokens: Sequence[Token], limit: int, end: int | None
) -> list[Token]:
    """The first of `tokens` that may follow, and `end` behind them where the text is complete then."""
    with ahead.matcher.trying():
        allowed = [*tokens[: ahead.accept([token.token for token in tokens], vocabulary, at_once=True)]]
        if len(allowed) < len(tokens) or ahead.lost:
            return allowed
        if end is not None and len(allowed) < limit and ahead.ends():
            if ahead.now()[0].allows(FREE):
                # The end of a stretch of structure may end the text; prose may end anywhere.
                return [*allowed, Token(end, Kind.STOPPED)] if allowed else []
            if allowed and allowed[-1].kind is Kind.EDGE:
                # The whole text is known: nothing follows that a longer token could hold.
                allowed[-1] = allowed[-1]._replace(kind=Kind.FORCED)
            allowed.append(Token(end, Kind.END))
    return allowed


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
    tail = _open_word(vocabulary, tail[-TAIL:])
    key = *tail, *pieces
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
    tokens = cut_behind(vocabulary, text_of(vocabulary, tail), text)
    first = Kind.FORCED
    if tokens is None:
        tokens, first = cut_behind(vocabulary, "", text), Kind.SEAM
    if not tokens:
        return []
    pairs = cuts.applied(vocabulary, tail[-1] if tail else NOTHING, tokens)
    of_bytes = [kind for part, kind in pieces for _ in part.encode()]
    chosen: list[tuple[Token, Sequence[Kind] | None]] = []
    begin = 0
    for number, (token, usual) in enumerate(pairs):
        stop = begin + len(vocabulary.token_bytes[token])
        ends = [first] * (number == 0) + [Kind.EDGE] * (number == len(pairs) - 1)
        kinds = ends + of_bytes[begin:stop]
        reason = Token(token, kinds[0], None if usual == token else usual)
        chosen.append((reason, None if kinds.count(kinds[0]) == len(kinds) else [*dict.fromkeys(kinds)]))
        begin = stop
    return chosen


def _open_word(vocabulary: Vocabulary, tail: Sequence[int]) -> Sequence[int]:
    """The end of `tail` that may be cut together with what follows: the newest that begins behind a whole word."""
    parts = [bytes_of(vocabulary, (token,)) for token in tail]
    for at in range(len(parts) - 1, 0, -1):
        if parts[at][:1] in BREAKS and parts[at - 1][-1:].isalnum():
            return tail[at:]
    return tail
