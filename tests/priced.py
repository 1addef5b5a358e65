"""Prices of a made-up machine, for tests of routes: tables that were measured without noise."""

from collections.abc import Callable, Mapping

from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.prices.tables import CostTables, Sizes, Verifications

NO_DRAFTERS: Mapping[str, float] = {}


def line(first: float, each: float) -> Sizes:
    """Seconds of one, and of each further row or request."""
    return Sizes((1, 1001), (first, first + 1000 * each), steps=False)


def priced(
    width: Callable[[str], int],
    drafts: Mapping[str, float] = NO_DRAFTERS,
    *,
    base: float = 0.030,
    row: float = 0.0006,
    more: float = 0.1,
) -> Costs:
    """A verification of `base` seconds and `row` a row; `drafts`: seconds of a pass by arm, and the share `more` of
    them for each further request. The host works while the device does not.
    """
    costs, verify = Costs(width, overlaps=False), line(base + row, row)
    passes = {arm: line(seconds, more * seconds) for arm, seconds in drafts.items()}
    costs.tables = CostTables(Verifications(1, 2, verify, verify), passes, {})
    return costs
