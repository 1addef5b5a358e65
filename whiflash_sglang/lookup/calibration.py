"""How many copied tokens a match of some length is worth, learned while serving.

For each bucket of match length a decayed count of how often a copied token at depth k was right, given that all
before it were. It is seeded with a table measured offline, so that the first request is not blind.
"""

from bisect import bisect_right
from collections.abc import Sequence

BUCKETS = (2, 3, 4, 6, 9, 14, 22)
"""Smallest match length of each bucket."""

SEED = (0.45, 0.55, 0.65, 0.74, 0.82, 0.88, 0.93)
"""Chance that the next copied token is right, per bucket, before anything was seen."""

SEED_WEIGHT = 20.0
"""Observations that the seed counts for."""

DECAY = 0.995
"""Of earlier observations, at every new one of the same bucket."""


class MatchCalibration:
    """Running chance, per bucket, that one more copied token is right."""

    def __init__(self, seed: Sequence[float] = SEED) -> None:
        if len(seed) != len(BUCKETS):
            raise ValueError(
                f"the seed needs {len(BUCKETS)} chances, one per bucket of match length, got {len(seed)}"
            )
        self._right = [chance * SEED_WEIGHT for chance in seed]
        self._seen = [SEED_WEIGHT] * len(BUCKETS)

    @staticmethod
    def bucket(length: int) -> int:
        """Bucket of a match of `length` >= 2 tokens."""
        return bisect_right(BUCKETS, length) - 1

    def chance(self, length: int) -> float:
        """Chance that the token after a match of `length` is right."""
        i = self.bucket(length)
        return self._right[i] / self._seen[i]

    def expected(self, length: int, width: int) -> float:
        """Expected accepted drafts of `width` copied tokens, bonus token not counted.

        Each accepted token lengthens the match, so the chance moves up the buckets.
        """
        total, alive = 0.0, 1.0
        for depth in range(width):
            alive *= self.chance(min(length + depth, BUCKETS[-1]))
            total += alive
        return total

    def width(self, length: int, limit: int, worth: float) -> int:
        """Tokens to copy: as long as the next one is accepted with a chance of at least `worth`."""
        alive, width = 1.0, 0
        while width < limit:
            alive *= self.chance(min(length + width, BUCKETS[-1]))
            if alive < worth:
                break
            width += 1
        return max(width, 1)

    def observe(self, length: int, proposed: int, accepted: int) -> None:
        """`accepted` of `proposed` copied tokens were right after a match of `length`."""
        for depth in range(min(accepted + 1, proposed)):
            i = self.bucket(min(length + depth, BUCKETS[-1]))
            self._right[i] = self._right[i] * DECAY + (depth < accepted)
            self._seen[i] = self._seen[i] * DECAY + 1.0
