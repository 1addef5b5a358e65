"""Statistics that all requests share: how often proposed tokens were right, by why they were proposed, and how a target
cuts and lays out text that it was not free to choose. None of them holds a word of a request's text, but a cache of cut
texts, which tenants do not share.

A tokenizer cuts `":"get` one way. A target that would have written a blank there, and must not, cuts it another way,
and does so every time.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from whiflash_sglang.copying.calibration import SURE
from whiflash_sglang.drafts.rates import Rates
from whiflash_sglang.spans.vocabulary import Vocabulary, bytes_of, cut_behind
from whiflash_sglang.structure.layout import Layout

KEPT = 512
"""Number of cuts that are remembered; the one written least recently goes first."""

REASONS = 256
"""Number of texts that are cached with the reasons of their tokens, some three kilobytes each."""

MOST = 4
"""Largest number of replaced tokens in one text: after each of them the rest is cut again."""


class Cuts:
    """Remembers the token last written in place of the tokenizer's, by the token before it and the tokenizer's."""

    def __init__(self) -> None:
        self._written: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.reasons: OrderedDict[Hashable, Any] = OrderedDict()
        """Texts as they are cut now, cached for `sketch.cut` by all that it depends on but chances, and by tenant."""
        self.tenant: Hashable = None

    def of(self, tenant: Hashable) -> "Cuts":
        """Return these cuts for a tenant's request. Only texts of the same tenant are found in `reasons`."""
        self.tenant = tenant
        return self

    def learn(self, before: int, usual: int, written: int) -> None:
        """Learn that after `before` the target wrote `written` where the tokenizer has `usual`, in the same text."""
        if self._written.pop((before, usual), usual) != written:
            self.reasons.clear()
        if written != usual:
            self._written[before, usual] = written
        if len(self._written) > KEPT:
            self._written.popitem(last=False)
            self.reasons.clear()

    def applied(self, vocabulary: Vocabulary, before: int, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Cut the text of `tokens`, which follow `before`, as it was cut when it was written last.

        Returns each token with the tokenizer's at its place.
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
    """Return the tokens after `first` if it begins the text of `tokens`; None if that text begins otherwise."""
    text, begin = bytes_of(vocabulary, tokens), bytes_of(vocabulary, [first])
    if not begin or not text.startswith(begin):
        return None
    try:
        return cut_behind(vocabulary, "", text[len(begin) :].decode())
    except UnicodeDecodeError:
        return None


class Kind(IntEnum):
    """Why a token was proposed; the least likely one of several reasons counts."""

    __hash__ = int.__hash__  # an enum's own is written in Python, and slow

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
"""Factor on the weight of earlier tokens at every new one of the same kind."""


class StructureChances:
    """Decayed share of proposed tokens that were right, given that all before them were, by kind.

    cuts: how the target cuts marks otherwise than its tokenizer. habits: the newest layout of JSON, in blanks after
    marks, by whether it was in a structural tag.
    """

    def __init__(self) -> None:
        self._rates = Rates(SEED, SEED_WEIGHT, DECAY)
        self._chances = [min(chance, SURE) for chance in self._rates.all]
        self.of: Callable[[Kind], float] = self._chances.__getitem__
        """Returns the chance that a token of a kind is right."""
        self.cuts = Cuts()
        self.habits: dict[bool, Layout] = {}

    def observe(self, kind: Kind, right: bool) -> None:
        """Learn whether a token of this kind, with all before it right, was `right`."""
        self._rates.observe(kind, right)
        self._chances[kind] = min(self._rates.of(kind), SURE)


class LikelyText(NamedTuple):
    """A piece of text that is likely to follow. text: never empty. kind: why it is likely."""

    text: str
    kind: Kind
