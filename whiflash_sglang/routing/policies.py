"""The policies, one per class: each scores the arms of a request by expected acceptance length or by rank.

A policy judges one request and knows nothing of the batch; `assign` turns the scores of a whole batch into routes.
"""

import math
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from whiflash_sdk.hints import Span

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.prices.costs import PROBE_ROUNDS
from whiflash_sglang.records.signals import Decision, Signals
from whiflash_sglang.routing.estimate import AcceptanceByPlace, AcceptanceEstimator, place_of

FIRST_PROBE = 4
"""Rounds of the batch before an unknown arm is probed; doubles with every probe."""

PROBES_SHARE = 0.0015
"""Share of all tokens that probes of an arm may cost. An arm that is hardly worse is therefore probed more often."""

HOPELESS = 0.25
"""Accepted drafts per round. An arm with fewer than 1 is probed less often in proportion, but not below this value."""

MOST_ADAPTERS = 64
"""Largest number of adapters with means of their own; beyond it those of the least recently used one are dropped."""

INHERITED = 5
"""Most earlier probes of an arm, by any requests, that count for a new adapter: enough that adapters which come and go
have the arm probed once in PROBE_ROUNDS / 2 rounds."""

MOST_TOGETHER = 16
"""Most requests that probe an arm in one round: means forget old rounds (`estimate.MEMORY`), so more are wasted."""


Loss = Callable[[Mapping[int, str]], float]
"""Returns the share of a round's expected tokens per second that probes (request index → arm) cost."""


class Probes:
    """Chooses requests that try an unused arm for one round, since its acceptance or price may have changed.

    A probe routes these requests to the arm for one round, as a pin would; the other requests of the batch are priced
    as usual. In the next round these requests switch without the margin.

    Between two probes of an arm at least `_patience` rounds of the batch pass, for the adapter that has seen the arm
    least: a probe costs the batch a pass, whichever adapter learns from it. It is made by requests that

    - are free: a caller's pin, bias or `off` leaves nothing to try, and its rounds are no evidence for others
      (`Decision.free`);
    - may draft with the arm, and were not routed to it for `_patience` rounds of their own.

    Half of them probe together, `MOST_TOGETHER` at most: first those of adapters that have seen the arm least, then
    those that have gone without it longest. A draft pass takes hardly longer for several requests, and one round says
    little: in `whiflash lab simulate`, batches of 8 and 16 kept the worse drafter for their whole run after a few
    unlucky probes of one request each.

    A draft source makes a forecast (`Forecast`) and is never probed: it learns from every round.
    """

    def __init__(self, known: Callable[[str | None], AcceptanceEstimator]) -> None:
        """known: returns the estimator of an adapter, or of the target without one (None)."""
        self._known = known
        self._probed = Counter[str]()
        self._since: dict[str, int] = {}
        """By arm, rounds of the batch since it was probed, or first allowed."""
        self._losses: dict[str, float] = {}
        """By arm, the share of the round's tokens that its last probe was expected to cost."""

    def choose(self, teachers: Sequence[Signals | None], loss: Loss) -> Mapping[int, str]:
        """Choose this round's probes: request index → arm, one arm at most; empty if none is due.

        Args:
            teachers: each request's signals, None if it is not free. loss: see `Loss`.
        """
        able: defaultdict[str, defaultdict[str | None, list[tuple[int, Signals]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for index, signals in enumerate(teachers):
            if signals is not None:
                for arm in signals.unforeseen:
                    able[arm][signals.adapter].append((index, signals))
        for arm in self._since:
            self._since[arm] += 1
        for arm, members in sorted(able.items()):
            since = self._since.setdefault(arm, 0)
            patience = {each: self._patience(arm, each, len(of)) for each, of in members.items()}
            if since < min(patience.values()):
                continue
            due = sorted(
                (patience[adapter], -gone, index)
                for adapter, of in members.items()
                for index, signals in of
                if (gone := signals.without(arm)) >= patience[adapter]
            )
            if due and since >= due[0][0]:
                self._since[arm] = -1
                self._probed[arm] += 1
                chosen = {index: arm for *_, index in due[: self._together(sum(map(len, members.values())))]}
                self._losses[arm] = loss(chosen)
                return chosen  # only one arm is probed per round
        return {}

    @staticmethod
    def _together(requests: int) -> int:
        return min(max(requests // 2, 1), MOST_TOGETHER)

    def _patience(self, arm: str, adapter: str | None, requests: int) -> float:
        """Return the rounds without `arm` after which it is probed: more if it is well known or if it is bad.

        An arm whose probes cost little is probed more often, within `PROBES_SHARE` of all tokens. requests: those of
        the adapter that may draft with it.
        """
        known = self._known(adapter)
        drafts = min(max(known.usual(arm) - 1, HOPELESS), 1.0)
        probes = known.rounds(arm) / self._together(requests)
        if adapter is not None:
            probes += min(self._probed[arm], INHERITED)
        probes = min(probes, PROBE_ROUNDS)
        cheap = max(self._losses.get(arm, math.inf) / PROBES_SHARE, min(known.rounds(arm), PROBE_ROUNDS / 4))
        return min(min(PROBE_ROUNDS, FIRST_PROBE * 2**probes) / drafts, cheap)


Scores = Mapping[str, float]
"""Arm → expected tokens per round, bonus token included, or a rank. A request is never routed to an absent arm."""

PREFERRED, SECOND = 2.0, 1.0
"""Scores of policies that order arms without predicting lengths."""


class Policy:
    """Scores the arms of one request. By default it only orders arms and learns nothing.

    needs: the signals that it reads; no others are computed. candidates: the arms that it may choose, and that are
    asked for candidates and forecasts; None: all. prices_batches: whether its scores are expected tokens, so that
    routes may be priced against measured latencies. joins_arms: whether candidates compete with a pass for
    verification, and other arms extend a pass's drafts.
    """

    name: str
    needs: frozenset[str] = frozenset()
    candidates: frozenset[str] | None = frozenset(arms.PAIR)
    prices_batches = False
    joins_arms = False

    def score(self, signals: Signals) -> Scores:
        """Return the score of each allowed arm. `none` always has one, so that a route always exists."""
        raise NotImplementedError

    def probe(self, teachers: Sequence[Signals | None], loss: Loss) -> Mapping[int, str]:
        """Begin a round of the batch and return its probes: request index → arm that it tries regardless of scores.

        teachers: each request's signals, None if its caller ordered the route. loss: see `Loss`.
        """
        return {}

    def observe(self, arm: str, decision: Decision, length: float) -> None:
        """Learn that a round of `arm`, by a `decision` that is `free`, committed `length` tokens."""

    def judge(self, arm: str, drafts: int, right: int) -> None:
        """Learn that the first `right` of `drafts` drafts of a pass were accepted and the next one was not."""

    def accepted(self, arm: str, drafts: float, after: int = 0) -> float:
        """Return the mean number of accepted drafts in places [after, drafts) of a pass, if all drafts before were."""
        return drafts - after


def order_pair(signals: Signals, *, ar_first: bool, min_dwell: int) -> Scores:
    """Return scores that order EAGLE-3 and DFlash, `ar_first` or not, and plain decoding last. A drafter that was used
    for fewer than `min_dwell` rounds stays first.
    """
    order = list(arms.PAIR if ar_first else reversed(arms.PAIR))
    if signals.previous in order and signals.dwell < min_dwell:
        order.sort(key=lambda arm: arm != signals.previous)
    return in_order(order, signals)


def in_order(order: Sequence[str], signals: Signals) -> Scores:
    """Return scores that rank the allowed arms of `order`, best first, and plain decoding last."""
    scores = {arm: PREFERRED - rank for rank, arm in enumerate(order) if arm in signals.allowed}
    return {**scores, arms.NONE: 0.0}


@dataclass(frozen=True, slots=True)
class Pinned(Policy):
    """Always chooses one arm, or plain decoding if that arm may not draft for the request."""

    name: str
    needs: frozenset[str] = frozenset()

    @property
    def candidates(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.name})

    def score(self, signals: Signals) -> Scores:
        if self.name in signals.allowed:
            return {self.name: PREFERRED, arms.NONE: SECOND}
        return {arms.NONE: SECOND}


@dataclass(frozen=True, slots=True)
class EntropyPolicy(Policy):
    """Chooses EAGLE-3 if the target's entropy exceeds τ, else DFlash (arXiv 2606.07710, entropy router).

    tau: nats. min_dwell: rounds that an arm is used before the next switch: switching every block was measured as a
    loss.
    """

    tau: float
    min_dwell: int = 2
    name: str = "entropy"
    needs: frozenset[str] = field(default=frozenset({"entropy"}))

    def score(self, signals: Signals) -> Scores:
        # Before the first verification the entropy is NaN, which exceeds no threshold.
        return order_pair(signals, ar_first=signals.entropy > self.tau, min_dwell=self.min_dwell)


class AutoPolicy(Policy):
    """Scores every arm by its expected acceptance length: its own forecast, or running means, separate by adapter.

    It needs no calibration: means have a weak prior, are shared per context, and combine with the request's own recent
    rounds. An unused arm that makes no forecast is probed now and then (`Probes`). If a router with heads is loaded
    (`heads`), its predictions replace the means and the target's entropy is not computed. It is not computed either if
    no arm needs a mean (`passes` False).
    """

    candidates = None
    name = "auto"
    prices_batches = True
    joins_arms = True

    def __init__(
        self, *, heads: bool = False, passes: bool = True, measured: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Set the priors of the means. heads, passes: see the class. measured: see `AcceptanceByPlace`."""
        self.needs = frozenset({"delta"} if heads else {"entropy"} if passes else ())
        places = AcceptanceByPlace(measured or {})
        self.judge, self.accepted = places.observe, places.accepted  # type: ignore[method-assign]
        lengths = {arm: 1 + places.accepted(arm, len(chances)) for arm, chances in (measured or {}).items()}
        self.estimator = AcceptanceEstimator(measured=lengths)
        self._probes = Probes(self._known)
        self._adapters: OrderedDict[str, AcceptanceEstimator] = OrderedDict()

    def score(self, signals: Signals) -> Scores:
        means, place, expected = self._known(signals.adapter), place_of(signals), signals.expected
        scores = {
            arm: expected[arm].length if arm in expected else means.expect(arm, signals, place)
            for arm in sorted(signals.allowed)
        }
        scores[arms.NONE] = 1.0
        return scores

    def probe(self, teachers: Sequence[Signals | None], loss: Loss = lambda _: math.inf) -> Mapping[int, str]:
        return self._probes.choose(teachers, loss)

    def observe(self, arm: str, decision: Decision, length: float) -> None:
        if arm != arms.NONE and arm not in decision.expected:
            self._known(decision.adapter).observe(arm, decision, length)

    def _known(self, adapter: str | None) -> AcceptanceEstimator:
        """Return the estimator of an adapter (None: the target's). A new adapter's has the target's as its prior."""
        if adapter is None:
            return self.estimator
        if adapter not in self._adapters:
            self._adapters[adapter] = AcceptanceEstimator(self.estimator)
            if len(self._adapters) > MOST_ADAPTERS:
                self._adapters.popitem(last=False)
                self.estimator.forget_asked()
        self._adapters.move_to_end(adapter)
        return self._adapters[adapter]


PREFERENCE = 1.0
"""Expected tokens added to the score of a preferred arm before the request has used it in this kind of span.

After n such rounds the arm gains 1/(n + 1) of this, as if the preference were one round. Simulated
(`tests/routing/test_hinted.py`), a wrong preference costs at most 4 % of the speed; a constant 1.5 tokens cost 2 to
19 %.
"""

RANKS = 1.5
"""Score added to a preferred arm if the policy only orders arms: it moves the arm up one rank and past a tie."""


def apply_hints(
    scores: Mapping[str, float],
    span: Span | None,
    allowed: frozenset[str],
    *,
    off: bool,
    measured: Mapping[str, Mean] | None = None,
) -> tuple[Scores, str]:
    """Apply the open span's hints to a policy's scores; return the scores and the reason (`telemetry.tally.REASONS`).

    A pin routes to its arm whatever the scores are. A bias is added to its arm's score. A preference adds less and less
    as the request's own rounds are measured. Preference and bias only move arms that have a score; a request is never
    routed to an arm that may not draft for it.

    off: whether the request's hints turn drafting off. measured: the request's own rounds in this kind of span, by arm;
    None if the policy only orders arms.
    """
    if off:
        return {arms.NONE: 1.0}, "off"
    unmoved = scores, "policy" if measured is None else "score"
    if span is None:
        return unmoved
    if span.pin and (span.prefer in allowed or span.prefer == arms.NONE):
        return {str(span.prefer): scores.get(str(span.prefer), 1.0)}, "pin"
    wishes = {str(arm): added for arm, added in span.bias.items()}
    if span.prefer is not None:
        wishes[span.prefer] = wishes.get(span.prefer, 0.0) + _preference(span.prefer, measured)
    if not wishes.keys() & scores.keys():
        return unmoved
    return {arm: score + wishes.get(arm, 0.0) for arm, score in scores.items()}, "span"


def _preference(arm: str, measured: Mapping[str, Mean] | None) -> float:
    if measured is None:
        return RANKS
    mean = measured.get(arm)
    return PREFERENCE / (1.0 + (mean.weight if mean else 0.0))


class RandomPolicy(Policy):
    """Chooses an arm at random every round, to test that switching never changes a text."""

    candidates = None
    name = "random"
    needs: frozenset[str] = frozenset()
    joins_arms = True

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def score(self, signals: Signals) -> Scores:
        choices = sorted(signals.allowed | {arms.NONE})
        return {arm: self._random.random() for arm in choices}
