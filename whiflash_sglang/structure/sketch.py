"""Proposes tokens: text that a grammar forces, or that is likely, cut as the target would cut it."""

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, cut_behind, text_of
from whiflash_sglang.structure.calls import Calls
from whiflash_sglang.structure.chances import REASONS, Cuts, Kind, LikelyText
from whiflash_sglang.structure.guesses import FREE, Ahead, Guesses, Likelihood, is_whole, likely

NOTHING = -1
"""In place of a token id, before the first token of a text."""

CHARS_PER_TOKEN = 16
"""Characters of text that are asked for, and cut into tokens, per token that may be proposed."""

TAIL = 6
"""Tokens at the text's end that are cut again with what follows, since a word may cross the seam."""

BREAKS = frozenset(bytes([code]) for code in range(128) if not chr(code).isalnum() and chr(code) != "'")
"""Characters that end a word or a number before them: tokenizers cut there, except in contractions."""


class Token(NamedTuple):
    """A token to propose, and why. usual: the tokenizer's token in its place; None: the same."""

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
    """Return at most `limit` tokens that are likely to follow a text, all allowed by its grammar, and whether nothing
    is known to follow them.

    If a tool call is open, the continuation that its tools expect is taken if more of its tokens are expected right.

    Work for each of the two: at most `STEPS` pieces are asked for; `limit` times `CHARS_PER_TOKEN` characters and the
    tail are cut, at most `chances.MOST` parts of them again; `limit` tokens are accepted and taken back.

    Args:
        ahead: at the end of the text; it is not changed. None: no grammar constrains it. tail: the text's last tokens.
        end: the token that ends a text; None: none is proposed. likelihood: of a kind; a token's kind is the least
            likely of its reasons. calls: of the request's tools, which forbid nothing; guesses: for them.
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
    """Return how many of the tokens are expected to be right."""
    return sum(accumulate((likelihood(token.kind) for token in tokens), operator.mul), 0.0)


def _allowed(ahead: Ahead, vocabulary: Vocabulary, tokens: Sequence[Token], limit: int, end: int | None) -> list[Token]:
    """Return the first of `tokens` that may follow, and `end` after them if the text is complete then."""
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
    """Cut the pieces' text into the tokens that the target would most likely use after `tail`; at most `limit`.

    The tail's open word is cut again together with the text, since the parts of a word are cut otherwise than the
    whole. If no token begins at the seam, the text is cut by itself.
    """
    tail = _open_word(vocabulary, tail[-TAIL:])
    key = cuts.tenant, *tail, *pieces
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
    """Return the tokens of `cut`, each with the kinds of its characters; None if they have one kind, the token's."""
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
    """Return the end of `tail` to cut again with what follows: from the newest token that begins after a word."""
    parts = [bytes_of(vocabulary, (token,)) for token in tail]
    for at in range(len(parts) - 1, 0, -1):
        if parts[at][:1] in BREAKS and parts[at - 1][-1:].isalnum():
            return tail[at:]
    return tail
