"""What probably follows a text, piece by piece, as far as anybody can say."""

from collections.abc import Callable, Sequence

from whiflash_sglang.structure.chances import Kind
from whiflash_sglang.structure.guesses import Guesses
from whiflash_sglang.structure.layout import Layout
from whiflash_sglang.structure.matchers import Matcher
from whiflash_sglang.structure.pieces import Piece

STEPS = 32
"""Pieces that are asked for in a row."""

HOPELESS = 0.02
"""Chance below which nothing behind a piece is looked for."""

Likelihood = Callable[[Kind], float]
"""Of a kind."""


def gather(step: Callable[[int], Sequence[Piece] | None], limit: int, likelihood: Likelihood) -> list[Piece]:
    """What `step` says again and again, until it says None: `limit` characters and `STEPS` pieces at most.

    Args:
        step: pieces of at most so many characters, if it likes; what is more is cut off.
    """
    pieces: list[Piece] = []
    chance = 1.0
    for _ in range(STEPS):
        found = step(limit) if limit > 0 and chance >= HOPELESS and len(pieces) < STEPS else None
        if found is None:
            break
        for piece in found:
            if limit > 0:
                pieces.append(piece._replace(text=piece.text[:limit]))
            limit -= len(piece.text)
            chance *= likelihood(piece.kind)
    return pieces


def likely(
    matcher: Matcher,
    limit: int,
    guesses: Guesses | None,
    layout: Layout,
    likelihood: Likelihood,
    ending: str = "",
) -> list[Piece]:
    """What must follow and, where nothing must, what `guesses` say; at most `limit` characters.

    The matcher is as it was.

    Args:
        layout: of the text so far; left as it is. ending: what follows a text that is complete.
    """
    layout = layout.copy()

    def step(limit: int) -> list[Piece] | None:
        forced = matcher.forced()[:limit]
        found = [Piece(forced, Kind.FORCED)] if forced else guesses.next(matcher, layout) if guesses else []
        text = "".join(piece.text for piece in found)
        if not text or not matcher.accept_text(text):
            return None
        layout.follow(text)
        return found

    with matcher.trying():
        pieces = gather(step, limit, likelihood)
        limit -= sum(len(piece.text) for piece in pieces)
        if ending and limit >= len(ending) and matcher.may_end and not matcher.forced():
            pieces.append(Piece(ending, Kind.CLOSED))
    return pieces
