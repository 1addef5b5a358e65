"""Why tokens are proposed. How often each reason is right is learned while serving, for all requests of a server."""

from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    """Why a token was proposed; the least likely one of several reasons counts."""

    FORCED = 0
    """The grammar allows no other text."""
    SEAM = 1
    """The first token, where the tokenizer would cut across its beginning: it follows text that is cut otherwise."""
    EDGE = 2
    """The last token of the known text: a longer token may hold its end and what follows."""
    END = 3
    """The text may end here, and little else may follow."""
    LAYOUT = 4
    """The only punctuation, or the only type of value, that may follow, laid out as before."""
    USUAL = 5
    """As LAYOUT, but laid out as is usual, since no such place was written yet."""
    CHOICE = 6
    """One of several punctuation marks, or of several types of value, that may follow."""
    USED = 7
    """A name or a listed value: of those allowed here, the one that this conversation used most."""
    WORD = 8
    """As USED, but none was used more than the others: of these, the schema's first."""
    CLOSED = 9
    """The end of a tool call that is complete."""
    OPENED = 10
    """The rest of a tool call's marker, and the blanks after it."""
    ENDED = 11
    """The rest of the markup that ends a value, after its beginning."""
    BEGUN = 12
    """The beginning of a tool call where nothing of one was written, but one may begin."""
    STOPPED = 13
    """The text may end here, or go on with anything."""


SEED = (0.98, 0.7, 0.6, 0.9, 0.95, 0.6, 0.5, 0.6, 0.4, 0.9, 0.8, 0.6, 0.3, 0.5)
"""Initial chances by kind. They are guesses, which some tens of tokens overrule."""

SEED_WEIGHT = 8.0
"""Weight of the initial chances, in tokens."""

DECAY = 0.995
"""Factor on the weight of earlier tokens at every new one of the same kind, as in compiled code."""


class LikelyText(NamedTuple):
    """A piece of text that is likely to follow. text: never empty. kind: why it is likely. among: the words among
    which the one that the conversation used most was chosen; empty: nothing was chosen.
    """

    text: str
    kind: Kind
    among: tuple[str, ...] = ()
