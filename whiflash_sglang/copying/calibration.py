"""How likely a copied token is right, learned while serving, of every tenant by itself.

Two things show it: how long the match is, and whether the places that match agree on what comes next. For every
combination a decayed count of how often a token copied then was right, given that all before it were.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import chain
from typing import Generic, TypeVar

from whiflash_sglang.copying.tenants import Tenant, handle_of
from whiflash_sglang.drafts.rates import Rates

BUCKETS = (1, 2, 3, 4, 6, 9, 14, 22)
"""Smallest match length of each bucket."""


class Agreement(IntEnum):
    """The matching places' votes on the next token."""

    ALONE = 0
    """There is one place."""
    UNANIMOUS = 1
    """All places say the same."""
    LEADING = 2
    """Places differ, and the one copied from matches longer than those that say otherwise."""
    CONTESTED = 3
    """Places that match as long say otherwise."""


Seed = Sequence[Sequence[float]]
"""Chances before anything was seen: one row per bucket, in it one chance per agreement."""

KINDS = len(Agreement)
EVEN_ODDS: Seed = ((0.5,) * KINDS,) * len(BUCKETS)
"""`seed` starts from this if nothing was measured."""

SEED_WEIGHT = 4.0
"""Observations that the seed counts for."""

DECAY = 0.995
"""Factor on earlier observations at every new one of the same kind."""

REQUEST_WEIGHT = 64.0
"""Right copies for which a request is believed to copy as well as its tenant's others."""

SURE = 0.995
"""No chance is higher: even a long run ends."""


TENANTS = 512
"""Tenants whose chances are kept, some 4 KiB each; whoever asked least recently begins with the seed again."""


class MatchCalibration:
    """Running chance that a copied token is right, for all requests of a tenant.

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
        """Bucket of a match of `length` >= 1 tokens."""
        return bisect_right(BUCKETS, length) - 1

    def chance(self, length: int, agreement: int) -> float:
        """Chance that the token copied after a match of `length` is right."""
        return self._rates.of(self.bucket(length) * KINDS + agreement)

    def along(self, length: int, agreement: int, count: int) -> list[float]:
        """Chances of `count` tokens of a copy that goes on after a match of `length`, none above `SURE`."""
        chances: list[float] = []
        while count > 0:
            bucket = self.bucket(length)
            run = count if bucket == len(BUCKETS) - 1 else min(BUCKETS[bucket + 1] - length, count)
            chances += [min(self.chance(length, agreement), SURE)] * run
            length, count = length + run, count - run
        return chances

    @property
    def addresses(self) -> tuple[int, int]:
        """Those of its rates, for compiled code."""
        return self._rates.addresses

    @property
    def chances(self) -> list[float]:
        """Chance of every bucket and agreement, bucket by bucket."""
        return self._rates.all

    def observe(self, length: int, agreement: int, right: bool) -> None:
        """A token copied after a match of `length`, with all before it accepted, was `right` or not."""
        self._rates.observe(self.bucket(length) * KINDS + agreement, right)


Table = TypeVar("Table")


class PerTenant(Generic[Table]):
    """Every tenant's own table of what was learned, each begun alike.

    A tenant's text moves its own proposals only. Requests without a key, which share SGLang's prefix cache
    too, have one table together, which no tenant reads.

    Args:
        fresh: a table that nothing was learned in. limit: tenants that are kept.
    """

    def __init__(self, fresh: Callable[[], Table], limit: int = TENANTS) -> None:
        self._fresh, self._most = fresh, limit
        self._keyless = fresh()
        self._tenants: OrderedDict[Tenant, Table] = OrderedDict()

    def __len__(self) -> int:
        """Tenants that something was learned of."""
        return len(self._tenants)

    def fresh(self) -> Table:
        """A table for one request alone, which leaves nothing behind."""
        return self._fresh()

    def of(self, tenant: Tenant | None) -> Table:
        """The table that the tenant's requests share; None: those without a key."""
        if tenant is None:
            return self._keyless
        table = self._tenants.pop(tenant, None) or self.fresh()
        self._tenants[tenant] = table
        if len(self._tenants) > self._most:
            self._tenants.popitem(last=False)
        return table

    def forget(self, handle: int | None = None) -> None:
        """Drop what was learned of one tenant, or of everybody; requests that run now teach nobody any more."""
        if handle is None:
            self._keyless = self.fresh()
        for tenant in list(self._tenants):
            if handle is None or handle_of(tenant) == handle:
                del self._tenants[tenant]


class RequestCalibration:
    """How much better or worse than its tenant's others a request copies: copies begun right over those expected to be.

    It moves a whole copy, not each of its tokens: a factor on every one of them would be raised to the copy's length.
    """

    def __init__(self) -> None:
        self._right = self._expected = REQUEST_WEIGHT

    def adjust(self, chance: float) -> float:
        """The chance that a copy's first token is right, as it is for this request; `chance`: for all of its tenant."""
        return min(chance * self.factor, SURE)

    @property
    def factor(self) -> float:
        """Copies begun right over those expected to be."""
        return self._right / self._expected

    def observe(self, chance: float, right: bool) -> None:
        """A copy's first token, at `chance` (of all of the tenant's requests), was `right` or not."""
        self._right += right
        self._expected += chance
