"""What a grammar lets one say of the next tokens: the text that is known, cut as the target would cut it."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of
from whiflash_sglang.structure.calls import Ahead
from whiflash_sglang.structure.chances import Kind
from whiflash_sglang.structure.guesses import Guesses
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import Matcher
from whiflash_sglang.structure.pieces import Piece

CHARS_PER_TOKEN = 16
"""Characters that are cut into tokens for each token that may be proposed."""

TAIL = 6
"""Tokens of what was written that are cut together with what follows: pieces of words meet at the seam."""


class Token(NamedTuple):
    """One token to propose, and why."""

    token: int
    kind: Kind


STEPS = 32
"""Pieces that are asked for in a row."""

HOPELESS = 0.02
"""Chance below which nothing behind a piece is looked for."""


def likely(
    matcher: Matcher,
    limit: int,
    guesses: Guesses | None,
    layout: Layout,
    likelihood: Callable[[Kind], float],
    ending: str = "",
) -> list[Piece]:
    """What must follow and, where nothing must, what `guesses` say; at most `limit` characters.

    The matcher is as it was.

    Args:
        layout: of the text so far; left as it is. ending: what follows a text that is complete.
    """
    pieces: list[Piece] = []
    layout, chance = layout.copy(), 1.0
    with matcher.trying():
        while limit > 0 and len(pieces) < STEPS and chance >= HOPELESS:
            forced = matcher.forced()[:limit]
            piece = Piece(forced, Kind.FORCED) if forced else guesses and guesses.next(matcher, layout)
            if not piece or not matcher.accept_text(piece.text):
                break
            layout.follow(piece.text)
            pieces.append(piece)
            limit -= len(piece.text)
            chance *= likelihood(piece.kind)
        if ending and limit >= len(ending) and matcher.may_end and not matcher.forced():
            pieces.append(Piece(ending, Kind.CLOSED))
    return pieces


def sketch(
    matcher: Matcher | None,
    vocabulary: Vocabulary,
    tail: Sequence[int],
    limit: int,
    *,
    end: int | None,
    likelihood: Callable[[Kind], float],
    guesses: Guesses | None = None,
    layout: Layout | None = None,
    call: Ahead | None = None,
) -> list[Token]:
    """At most `limit` tokens that are likely to follow what the matcher has accepted, all of them allowed by it.

    Where a call is open and its tools tell of more tokens that the matcher allows than it does, theirs are taken.

    Work, for each of the two: at most `STEPS` pieces are asked for, `limit` times `CHARS_PER_TOKEN` characters and the
    tail are cut, `limit` tokens accepted and taken back.

    Args:
        tail: the last tokens that were accepted. end: the token that ends a text; None: none is proposed.
        likelihood: of a kind; the least likely one of a token's reasons is its kind. guesses: what follows where
            nothing is forced; layout: of the text so far, for them. call: what a tool call goes on with
            (`calls.Calls`), which forbids nothing.
    """
    most = limit * CHARS_PER_TOKEN
    sources: list[list[Piece]] = []
    if matcher is not None:
        sources.append(likely(matcher, most, guesses, layout or Layout(), likelihood))
    if call is not None:
        sources.append(_of_a_call(call, most, guesses, likelihood))
    found: list[Token] = []
    for pieces in sources:
        tokens = cut(vocabulary, tail, pieces, likelihood)[:limit] if pieces else []
        if matcher is not None:
            tokens = _allowed(matcher, vocabulary, tokens, limit, end)
        found = max(found, tokens, key=len)
    return found


def _of_a_call(
    call: Ahead, limit: int, guesses: Guesses | None, likelihood: Callable[[Kind], float]
) -> list[Piece]:
    """What opens it, what its grammar says, and what closes it."""
    opening = call.opening
    pieces = [] if opening is None else [opening._replace(text=opening.text[:limit])]
    limit -= sum(len(piece.text) for piece in pieces)
    if call.matcher is None or limit <= 0:
        return pieces
    return pieces + likely(call.matcher, limit, guesses, call.layout, likelihood, call.ending)


def _allowed(
    matcher: Matcher, vocabulary: Vocabulary, tokens: Sequence[Token], limit: int, end: int | None
) -> list[Token]:
    """The first of `tokens` that the matcher allows, and `end` behind them where the text is complete then."""
    allowed: list[Token] = []
    with matcher.trying():
        for token in tokens:
            if not (is_text(vocabulary, token.token) and matcher.accept_token(token.token)):
                return allowed
            allowed.append(token)
        if end is not None and len(allowed) < limit and matcher.may_end and not matcher.forced():
            if allowed and allowed[-1].kind is Kind.EDGE:
                # The whole text is known: nothing follows that a longer token could hold.
                allowed[-1] = Token(allowed[-1].token, Kind.FORCED)
            allowed.append(Token(end, Kind.END))
    return allowed


def cut(
    vocabulary: Vocabulary,
    tail: Sequence[int],
    pieces: Sequence[Piece],
    likelihood: Callable[[Kind], float],
) -> list[Token]:
    """The pieces' text in the tokens that the target would most likely use behind `tail`.

    The tail is cut again together with the text, since a word that it leaves open is cut otherwise alone; where no
    token begins at the seam, the text is cut by itself.
    """
    text = "".join(piece.text for piece in pieces)
    written = text_of(vocabulary, tail[-TAIL:])
    tokens = _behind(vocabulary, written, text)
    first = Kind.FORCED
    if tokens is None:
        tokens, first = _behind(vocabulary, "", text), Kind.SEAM
    if not tokens:
        return []
    ends = list(accumulate(len(vocabulary.token_bytes[token]) for token in tokens))
    bounds = list(accumulate(len(piece.text.encode()) for piece in pieces))
    found, piece, begin = [], 0, 0
    for number, (token, stop) in enumerate(zip(tokens, ends, strict=True)):
        kinds = [first] if number == 0 else []
        kinds += [Kind.EDGE] if number == len(tokens) - 1 else []
        while bounds[piece] <= begin:
            piece += 1
        last = piece
        while bounds[last] < stop:
            last += 1
        kinds += [own.kind for own in pieces[piece : last + 1]]
        found.append(Token(token, min(kinds, key=likelihood)))
        begin = stop
    return found


def is_text(vocabulary: Vocabulary, token: int) -> bool:
    """Whether a token stands for text, of which alone grammars speak; xgrammar complains of others aloud."""
    table = vocabulary.token_bytes
    return 0 <= token < len(table) and bool(table[token]) and token not in vocabulary.special


def text_of(vocabulary: Vocabulary, tokens: Sequence[int]) -> str:
    """The end of what tokens stand for, from the first character that is whole; empty where the last one is not."""
    data = bytes_of(vocabulary, tokens)
    begin = next((i for i, byte in enumerate(data) if byte & 0xC0 != 0x80), len(data))
    try:
        return data[begin:].decode()
    except UnicodeDecodeError:
        return ""


def _behind(vocabulary: Vocabulary, written: str, text: str) -> list[int] | None:
    """Tokens of `text` where it is cut together with what stands before it; None: no token begins with it."""
    tokens, table = vocabulary.encode(written + text), vocabulary.token_bytes
    data, whole = b"".join(table[token] for token in tokens), (written + text).encode()
    if data not in (whole, b" " + whole):  # SentencePiece sets a blank before a text
        return None
    left = len(written.encode()) + len(data) - len(whole)
    for number, token in enumerate(tokens):
        if left == 0:
            return list(tokens[number:])
        left -= len(table[token])
        if left < 0:
            return None
    return []
