"""When an arm that is not used is tried again, and by whom."""

from collections.abc import Callable, Mapping, Sequence

from whiflash_sglang.routing.estimate import AcceptanceEstimator
from whiflash_sglang.routing.signals import Signals

PROBE_ROUNDS = 256
"""Rounds of the batch between two probes of an arm that is well known."""

FIRST_PROBE = 4
"""The same for one that is not known; doubles with every round that was seen of it."""

HOPELESS = 0.25
"""Accepted drafts a round: an arm with fewer than one is tried the more seldom, down to what this many earn."""


class Probes:
    """Requests that try an arm for a round, whatever it promises: its acceptance or its price may have changed.

    A probe binds one request for one round, like a pin of its own; what the others of the batch do is priced as ever.
    An arm is probed at most once in as many rounds of the batch as it is known (`_patience`), by a request that

    - is free: a caller's pin, bias or `off` leaves nothing to try, and its rounds are no evidence for others
      (`Decision.free`);
    - may draft with the arm, and was not routed to it for as many rounds itself; what other requests use says little of
      it. Of several, the one that has gone without it longest, so that none takes all probes.

    An arm that says what it expects (`Outlook`) is never probed: it learns from every round, and costs nothing but its
    rows, which verification prices whoever drafted them.
    """

    def __init__(self, estimator: AcceptanceEstimator) -> None:
        self._estimator = estimator
        self._since: dict[str, int] = {}
        """Rounds of the batch since an arm was probed, or first allowed."""

    def choose(self, free: Sequence[Signals | None], timings: Callable[[str], int]) -> Mapping[int, str]:
        """Index → arm for this round of the batch, of at most one request per arm.

        Args:
            free: of every request, None for one that is not. timings: see `_patience`.
        """
        chosen: dict[int, str] = {}
        for arm in self._since:
            self._since[arm] += 1
        for arm in sorted({arm for signals in free if signals is not None for arm in signals.untold}):
            patience = self._patience(arm, timings(arm))
            if self._since.setdefault(arm, 0) < patience:
                continue
            waited = {
                index: signals.without(arm)
                for index, signals in enumerate(free)
                if signals is not None and arm in signals.untold and index not in chosen
            }
            longest = max(waited, key=waited.__getitem__, default=None)
            if longest is not None and waited[longest] >= patience:
                chosen[longest] = arm
                self._since[arm] = -1
        return chosen

    def _patience(self, arm: str, timings: int) -> float:
        """Rounds without `arm` after which it is tried: the more, the better it is known, and the worse it is.

        It is known as well as the less known of its acceptance and its price: `timings`, how often a draft was timed
        since its price was last found wrong. So what a busy moment made dear is timed again soon.
        """
        drafts = min(max(self._estimator.usual(arm) - 1, HOPELESS), 1.0)
        return min(PROBE_ROUNDS / drafts, FIRST_PROBE * 2 ** min(self._estimator.rounds(arm), timings))
