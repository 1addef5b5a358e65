"""Learned while serving, of every tenant by itself: how likely a token is that structure proposes, and how a target
cuts text that it was not free to choose.

A tokenizer cuts `":"get` one way; a target that would have written a blank there, and must not, cuts it another way,
and does so every time.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from whiflash_sglang.copying.calibration import SURE
from whiflash_sglang.drafts.rates import Rates
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, cut_behind
from whiflash_sglang.structure.layout import Habit

KEPT = 512
"""Places that are remembered; the one that was seen least recently goes first."""

REASONS = 256
"""Texts of a tenant that are kept with the reasons of their tokens, some three kilobytes each."""

MOST = 4
"""Places of one text that are cut otherwise: after each of them the rest is cut again."""


class Cuts:
    """Tokens written last in place of the usual one, by the token before the place and the usual one."""

    def __init__(self) -> None:
        self._written: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.reasons: OrderedDict[Hashable, Any] = OrderedDict()
        """Texts as they are cut now (`sketch.cut`), by all that it depends on but chances."""

    def learn(self, before: int, usual: int, written: int) -> None:
        """After `before`, where the tokenizer has `usual`, the same text was begun with `written`."""
        if self._written.pop((before, usual), usual) != written:
            self.reasons.clear()
        if written != usual:
            self._written[before, usual] = written
        if len(self._written) > KEPT:
            self._written.popitem(last=False)
            self.reasons.clear()

    def applied(self, vocabulary: Vocabulary, before: int, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """The text of `tokens`, which follow `before`, as it was cut when it was seen last.

        Each with the token that the tokenizer has in its place.
        """
        cuts: list[tuple[int, int]] = []
        rest, left = list(tokens), MOST if self._written else 0
        while rest:
            usual = rest.pop(0)
            written = self._written.get((before, usual)) if left else None
            if written is not None and (anew := _cut_anew(vocabulary, written, [usual, *rest])) is not None:
                rest, left = anew, left - 1
            else:
                written = usual
            cuts.append((written, usual))
            before = written
        return cuts


def _cut_anew(vocabulary: Vocabulary, first: int, tokens: Sequence[int]) -> list[int] | None:
    """The text of `tokens` behind its first token `first`; None where it does not begin with that."""
    text, begin = bytes_of(vocabulary, tokens), bytes_of(vocabulary, [first])
    if not begin or not text.startswith(begin):
        return None
    try:
        return cut_behind(vocabulary, "", text[len(begin) :].decode())
    except UnicodeDecodeError:
        return None


class Kind(IntEnum):
    """Why a token was proposed. The least likely one of several counts."""

    __hash__ = int.__hash__  # an enum's own is Python

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
    """A name or a listed value, of those allowed here the one that this conversation used most."""
    WORD = 8
    """The same where none was used: the schema's first."""
    CLOSED = 9
    """Closes a tool call that is complete."""
    OPENED = 10
    """The rest of a tool call's marker, and the blanks behind it."""
    ENDED = 11
    """Ends a value in markup that has begun."""
    BEGUN = 12
    """A tool call where nothing of one was written, but one may begin."""
    STOPPED = 13
    """The text may end here, or go on with anything."""


SEED = (0.98, 0.7, 0.6, 0.9, 0.95, 0.6, 0.5, 0.6, 0.4, 0.9, 0.8, 0.6, 0.3, 0.5)
"""Chances before anything was seen, by kind: guesses, which some tens of tokens overrule."""

SEED_WEIGHT = 8.0
"""Tokens that the seed counts for."""

DECAY = 0.995
"""Factor on earlier tokens at every new one of the same kind."""


class StructureChances:
    """Decayed share of the tokens of each kind that were right, given that all before them were.

    cuts: how text was cut otherwise than its tokenizer cuts it. habits: how JSON was laid out last, by whether it
    is in a structural tag.
    """

    def __init__(self) -> None:
        self._rates = Rates(SEED, SEED_WEIGHT, DECAY)
        self._chances = [min(chance, SURE) for chance in self._rates.all]
        self.of: Callable[[Kind], float] = self._chances.__getitem__
        """Chance that a token of a kind is right."""
        self.cuts = Cuts()
        self.habits: dict[bool, Habit] = {}

    def observe(self, kind: Kind, right: bool) -> None:
        """A token of this kind, with all before it right, was `right` or not."""
        self._rates.observe(kind, right)
        self._chances[kind] = min(self._rates.of(kind), SURE)


class LikelyText(NamedTuple):
    """text: never empty. kind: why it is likely."""

    text: str
    kind: Kind
