"""How likely a token is that structure proposes, learned while serving, of every tenant by itself."""

from enum import IntEnum

from whiflash_sglang.lookup.calibration import SURE
from whiflash_sglang.structure.cuts import Cuts
from whiflash_sglang.structure.layout import Habit


class Kind(IntEnum):
    """Why a token was proposed. Of several reasons the least likely one counts."""

    FORCED = 0
    """The grammar allows no other text."""
    SEAM = 1
    """The first one, where what was written is not cut as its tokenizer would cut it now."""
    EDGE = 2
    """The last one of what is known: a longer token may hold it and what follows."""
    END = 3
    """The text may end here, and little else may follow."""
    LAYOUT = 4
    """The only punctuation, or the only type of value, that may follow, laid out as before."""
    USUAL = 5
    """The same, laid out as is usual: nothing of the kind was written yet."""
    CHOICE = 6
    """One of several punctuation marks, or of several types of value, that may follow."""
    USED = 7
    """A name or a listed value, of those that may stand here the one that this conversation used most."""
    WORD = 8
    """The same where none was used: the schema's first."""
    CLOSED = 9
    """What closes a tool call that is complete."""
    OPENED = 10
    """The rest of a tool call's marker, and the blanks behind it."""
    ENDED = 11
    """What ends a value in markup, where that has begun."""
    BEGUN = 12
    """A tool call where nothing of one was written, but one may begin."""
    STOPPED = 13
    """The text may end here, or go on with anything."""


SEED = (0.98, 0.7, 0.6, 0.9, 0.95, 0.6, 0.5, 0.6, 0.4, 0.9, 0.8, 0.6, 0.3, 0.5)
"""Chances before anything was seen, by kind: guesses, which some tens of tokens overrule."""

SEED_WEIGHT = 8.0
"""Tokens that the seed counts for."""

DECAY = 0.995
"""Of earlier tokens, at every new one of the same kind."""


class StructureChances:
    """Decayed share of the tokens of each kind that were right, given that all before them were.

    cuts: how text was cut otherwise than its tokenizer cuts it. habits: how JSON was laid out last, by whether it
    stands in a structural tag.
    """

    def __init__(self) -> None:
        self._right = [chance * SEED_WEIGHT for chance in SEED]
        self._seen = [SEED_WEIGHT] * len(SEED)
        self.cuts = Cuts()
        self.habits: dict[bool, Habit] = {}

    def of(self, kind: Kind) -> float:
        """Chance that a token of this kind is right."""
        return min(self._right[kind] / self._seen[kind], SURE)

    def observe(self, kind: Kind, right: bool) -> None:
        """A token of this kind, with all before it right, was `right` or not."""
        self._right[kind] = self._right[kind] * DECAY + right
        self._seen[kind] = self._seen[kind] * DECAY + 1.0
