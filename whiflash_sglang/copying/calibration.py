"""A table of how likely a copied token is right, learned while serving.

Two things show it: how long the match is, and whether the places that match agree on the next token. Each combination
has a decayed count of how often a token copied then was right, given that all before it were.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain

from whiflash_sglang.drafts.rates import Rates

BUCKETS = (1, 2, 3, 4, 6, 9, 14, 22)
"""Smallest match length of each bucket."""


class Agreement(IntEnum):
    """Degrees to which the matching places agree on the next token."""

    ALONE = 0
    """Only one place matches."""
    UNANIMOUS = 1
    """All places have the same token."""
    LEADING = 2
    """Places differ, and the one copied from matches longer than those with another token."""
    CONTESTED = 3
    """Places that match as long have another token."""


Seed = Sequence[Sequence[float]]
"""Initial chances: one row per bucket, in it one chance per agreement."""

KINDS = len(Agreement)
EVEN_ODDS: Seed = ((0.5,) * KINDS,) * len(BUCKETS)
"""The seed if nothing was measured."""

SEED_WEIGHT = 4.0
"""Weight of the seed, in observations."""

DECAY = 0.995
"""Factor on the weight of earlier observations at every new one of the same kind."""

REQUEST_WEIGHT = 64.0
"""Weight, in right copies, of the prior that a request copies as well as others."""


class MatchCalibration:
    """The chance that a copied token is right, by match length and agreement.

    All requests of a server share one, since it holds rates and no text.

    Raises:
        ValueError: the seed has not one row per bucket with one chance per agreement.
    """

    def __init__(self, seed: Seed = EVEN_ODDS) -> None:
        if len(seed) != len(BUCKETS) or any(len(row) != len(Agreement) for row in seed):
            raise ValueError(
                f"the lookup seed needs {len(BUCKETS)} rows (match lengths {', '.join(map(str, BUCKETS))}) of "
                f"{len(Agreement)} chances ({', '.join(a.name.lower() for a in Agreement)})"
            )
        self._rates = Rates(chain.from_iterable(seed), SEED_WEIGHT, DECAY)

    @staticmethod
    def bucket(length: int) -> int:
        """Return the bucket of a match of `length` >= 1 tokens."""
        return bisect_right(BUCKETS, length) - 1

    def chance(self, length: int, agreement: int) -> float:
        """Return the chance that the token copied after a match of `length` is right."""
        return self._rates.of(self.bucket(length) * KINDS + agreement)

    @property
    def addresses(self) -> tuple[int, int]:
        """Return `Rates.addresses` of its rates, for compiled code."""
        return self._rates.addresses

    @property
    def chances(self) -> list[float]:
        """Return all chances in one list, by bucket, then by `Agreement`."""
        return self._rates.all

    def observe(self, length: int, agreement: int, right: bool) -> None:
        """Learn whether a token copied after a match of `length`, with all before it accepted, was `right`."""
        self._rates.observe(self.bucket(length) * KINDS + agreement, right)


class RequestCalibration:
    """Compares a request's copying with that of all requests: copies whose first token was right, over those expected.

    It moves a whole copy, not each of its tokens: a factor on every one of them would be raised to the copy's length.
    """

    def __init__(self) -> None:
        self._begun = array("d", [REQUEST_WEIGHT] * 2)
        """Copies begun right, and those expected to be."""

    @property
    def factor(self) -> float:
        """Return the ratio of copies whose first token was right to those expected."""
        return self._begun[0] / self._begun[1]

    @property
    def address(self) -> int:
        """Return the address of two counts for compiled code: copies whose first token was right, those expected."""
        return self._begun.buffer_info()[0]

    def observe(self, chance: float, right: bool) -> None:
        """Learn whether a copy's first token was `right`. chance: that it would be, as learned from all requests."""
        self._begun[0] += right
        self._begun[1] += chance
