"""`Costs` where the device works behind the host: looked up in tables that were measured at the start.

There the host's clock says how long launching took, so nothing is fitted to it. What rounds add is one factor for all
prices (:mod:`.tables`), from whole rounds as the device's events time them.
"""

from collections.abc import Callable, Iterable, Sequence

from whiflash_sglang.routing.costs import FULL_LENGTH, WorkerCosts, Worth
from whiflash_sglang.routing.fits import MEMORY
from whiflash_sglang.routing.mean import Mean
from whiflash_sglang.routing.probes import PROBE_ROUNDS
from whiflash_sglang.routing.tables import HEADROOM, CostTables
from whiflash_sglang.telemetry.round_clock import PreviousRound


class LookedUpCosts(WorkerCosts):
    """Prices from `tables`, which must be set before anything is priced.

    A round pads its verification to more drafts than it expects (`HEADROOM`), so that is what rows are looked up by.
    """

    tables: CostTables
    knows_plain = True

    def __init__(self, width: Callable[[str], int]) -> None:
        super().__init__(width)
        self._context = self._verified = 0
        self._behind: dict[str, Mean] = {}

    def facing(self, contexts: Sequence[int]) -> None:
        self._context = sum(contexts)

    def ended(self, previous: PreviousRound) -> None:
        work, seconds = previous.work, previous.seconds
        self._verified = work.rows
        for arm, requests in work.drafted.items():
            self._behind.setdefault(arm, Mean()).add(work.caught_up.get(arm, 0) / requests, MEMORY)
        self.committed(previous.tokens, seconds, previous.gap)
        if seconds > 0.0:
            self.tables.took(
                seconds,
                rows=work.rows,
                context=work.context,
                drafted=work.drafted,
                caught_up=work.caught_up,
            )

    def timings(self, arm: str) -> int:
        """Every price was measured, and what is corrected is all of them at once: no arm is tried for its own."""
        return PROBE_ROUNDS

    def draft(self, arm: str, requests: int) -> float:
        behind = self._behind.get(arm)
        catch_up = self.tables.catch(arm, requests * behind.value) if behind else 0.0
        return self.tables.draft(arm, requests) + catch_up

    def verify(self, rows: float, requests: int) -> float:
        padded = requests + HEADROOM * (rows - requests)
        return self.tables.verify(padded, self._context) + self._gap

    def worth(self, arm: str) -> Worth:
        """A pass drafts its full length at once, so a further draft costs its row alone."""
        if not self._rate:
            return FULL_LENGTH
        return Worth(self._rate * self.tables.row(self._verified, self._context), 0.0)

    def fitted(self, arms: Iterable[str]) -> dict[tuple[str, str], float]:
        row = self.tables.row(1, self._context)
        found = {
            ("verify", ""): self.tables.verify(1, self._context),
            ("verify_draft", ""): row,
            ("verify_request", ""): row,
            ("between", ""): self._gap,
        }
        for arm in arms:
            alone = self.draft(arm, 1)
            found["draft", arm], found["draft_request", arm] = alone, self.draft(arm, 2) - alone
        return found
