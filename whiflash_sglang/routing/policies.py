"""`score(signals) → expected accepted tokens per arm`, one policy a class.

A policy judges one request and knows nothing of the batch; `assign` turns the scores of a whole batch into routes.
"""

import math
import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from whiflash_sdk.hints import Span

from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.rates import Mean
from whiflash_sglang.prices.costs import PROBE_ROUNDS
from whiflash_sglang.records.signals import Decision, Signals
from whiflash_sglang.routing.estimate import AcceptanceByPlace, AcceptanceEstimator, place_of

FIRST_PROBE = 4
"""Rounds of the batch between two probes of an arm that is not known; doubles with every probe."""

PROBES_SHARE = 0.0015
"""Share of the tokens that probes of an arm may cost: one that is hardly behind is tried the more often."""

HOPELESS = 0.25
"""Accepted drafts a round: an arm with fewer than one is tried the more seldom, down to what this many earn."""

MOST_ADAPTERS = 64
"""Adapters whose means are kept; beyond, those of the one that nobody has used for longest are dropped."""

INHERITED = 5
"""Probes of an arm, by whichever adapter's requests, that count as a new adapter's, at most: enough that adapters which
come and go have the arm probed once in PROBE_ROUNDS / 2 rounds."""

MOST_TOGETHER = 16
"""Requests that probe an arm in one round, at most: more would be forgotten (`estimate.MEMORY`) before it is known."""


Timings = Callable[[str], int]
Loss = Callable[[Mapping[int, str]], float]
"""Share of a round's expected tokens per second that these probes, index → arm, cost."""


class Probes:
    """Requests that try an arm for a round, whatever it promises: its acceptance or its price may have changed.

    A probe binds requests for one round, like pins of their own; what the others of the batch do is priced as ever.
    Afterwards the margin against switching favours no arm of theirs.
    An arm is probed at most once in as many rounds of the batch as it is known for the adapter that knows it least
    (`_patience`): a probe costs the batch a pass, whichever adapter learns from it. It is made by requests that

    - are free: a caller's pin, bias or `off` leaves nothing to try, and its rounds are no evidence for others
      (`Decision.free`);
    - may draft with the arm, and were not routed to it for as many rounds themselves; what other requests use says
      little of it.

    Half of them probe together, `MOST_TOGETHER` at most: those of adapters that know the arm least, of these those that
    have gone without it longest. A draft pass takes hardly longer for several requests, and the length of one round
    says little: `whiflash lab simulate` showed batches of 8 and 16 that kept the worse drafter for their whole run
    after a few unlucky probes of one request each.

    A draft source expects something (`Forecast`) and is never probed: it learns from every round.
    """

    def __init__(self, known: Callable[[str | None], AcceptanceEstimator]) -> None:
        """known: an adapter's means, or those of none."""
        self._known = known
        self._probed = Counter[str]()
        self._since: dict[str, int] = {}
        """Rounds of the batch since an arm was probed, or first allowed."""
        self._losses: dict[str, float] = {}
        """Share of its last probe's tokens that it was expected to cost."""

    def choose(self, teachers: Sequence[Signals | None], timings: Timings, loss: Loss) -> Mapping[int, str]:
        """Index → arm for this round of the batch, one arm at most.

        Args:
            teachers: of every request, None for one that is not free. timings: see `_patience`. loss: see `Loss`.
        """
        able = defaultdict[str, defaultdict[str | None, list[tuple[int, Signals]]]](lambda: defaultdict(list))
        for index, signals in enumerate(teachers):
            if signals is not None:
                for arm in signals.unforeseen:
                    able[arm][signals.adapter].append((index, signals))
        for arm in self._since:
            self._since[arm] += 1
        for arm, members in sorted(able.items()):
            timed, since = timings(arm), self._since.setdefault(arm, 0)
            patience = {each: self._patience(arm, timed, each, len(of)) for each, of in members.items()}
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
                return chosen  # another arm waits for the next round
        return {}

    @staticmethod
    def _together(requests: int) -> int:
        return min(max(requests // 2, 1), MOST_TOGETHER)

    def _patience(self, arm: str, timings: int, adapter: str | None, requests: int) -> float:
        """Rounds without `arm` after which it is tried: the more, the better it is known, and the worse it is.

        One that costs little is tried more often, `PROBES_SHARE` of all tokens at most. It is known as well as the less
        known of its acceptance and its price: `timings`, how often a draft was timed since its price was last found
        wrong. So what a busy moment made dear is timed again soon, if a price could make it pay. requests: that may
        draft with it, of the adapter.
        """
        known = self._known(adapter)
        drafts = min(max(known.usual(arm) - 1, HOPELESS), 1.0)
        probes = known.rounds(arm) / self._together(requests)
        if adapter is not None:
            probes += min(self._probed[arm], INHERITED)
        probes = min(probes, timings if drafts > HOPELESS else PROBE_ROUNDS)
        cheap = max(self._losses.get(arm, math.inf) / PROBES_SHARE, min(known.rounds(arm), PROBE_ROUNDS / 4))
        return min(min(PROBE_ROUNDS, FIRST_PROBE * 2**probes) / drafts, cheap)


Scores = Mapping[str, float]
"""Arm → expected accepted tokens a round, bonus token included. An arm that is absent must not be used."""

PREFERRED, SECOND = 2.0, 1.0
"""Scores of policies that order arms without predicting lengths."""


class Policy(Protocol):
    """A way to score. `needs` names the signals it reads, so that nothing else is gathered."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def candidates(self) -> frozenset[str] | None:
        """The arms that it may name, so that no other is asked what it expects of a round. None: any."""
        ...

    @property
    def prices_batches(self) -> bool:
        """Whether its scores are expected tokens, so that routes may be priced against measured latencies."""
        ...

    @property
    def joins_arms(self) -> bool:
        """Whether candidates are verified beside a pass, and drafts prolonged by what others know to follow them."""
        ...

    def score(self, signals: Signals) -> Scores:
        """Expected accepted tokens per allowed arm; `none` is always there, so that a route always exists."""
        ...

    def probe(self, teachers: Sequence[Signals | None], timings: Timings, loss: Loss) -> Mapping[int, str]:
        """A round of the whole batch begins: requests, by their index, that are to try an arm whatever it promises.

        teachers: of every request, None where its caller ordered the route. timings: how often an arm's price was found
        right. loss: see `Loss`.
        """
        ...

    def observe(self, arm: str, decision: Decision, length: float) -> None:
        """A request's round of `arm`, of this `decision`, committed `length` tokens; its caller ordered nothing."""
        ...

    def judge(self, arm: str, drafts: int, right: int) -> None:
        """The first `right` of `drafts` drafts of a pass were right, and the next one was not."""
        ...

    def accepted(self, arm: str, drafts: float, after: int = 0) -> float:
        """Mean number of accepted drafts of a pass from place `after` to `drafts`, if all before `after` were."""
        ...


class Blind:
    """The common part of policies that only order arms and learn nothing while serving."""

    candidates: frozenset[str] | None = frozenset(arms.PAIR)
    prices_batches = False
    joins_arms = False

    def probe(self, teachers: Sequence[Signals | None], timings: Timings, loss: Loss) -> Mapping[int, str]:
        """Nothing to try."""
        return {}

    def observe(self, arm: str, decision: Decision, length: float) -> None:
        """Nothing to learn."""

    def judge(self, arm: str, drafts: int, right: int) -> None:
        """Nothing to learn."""

    def accepted(self, arm: str, drafts: float, after: int = 0) -> float:
        """No more than drafts; these policies limit no pass."""
        return drafts - after


def order_pair(signals: Signals, *, ar_first: bool, min_dwell: int) -> Scores:
    """EAGLE-3 before DFlash or the other way round, plain decoding last; a drafter in use fewer than `min_dwell`
    rounds stays first.
    """
    order = list(arms.PAIR if ar_first else reversed(arms.PAIR))
    if signals.previous in order and signals.dwell < min_dwell:
        order.sort(key=lambda arm: arm != signals.previous)
    return in_order(order, signals)


def in_order(order: Sequence[str], signals: Signals) -> Scores:
    """The allowed arms of `order`, best first, and plain decoding last."""
    scores = {arm: PREFERRED - rank for rank, arm in enumerate(order) if arm in signals.allowed}
    return {**scores, arms.NONE: 0.0}


@dataclass(frozen=True, slots=True)
class Pinned(Blind):
    """Always the same arm where it may draft; plain decoding where it may not."""

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
class EntropyPolicy(Blind):
    """Leave the diffusion drafter where the target's entropy exceeds τ (arXiv 2606.07710, entropy router).

    tau: nats. min_dwell: rounds an arm is kept before the next switch, since blind switching every block
    was measured as a loss.
    """

    tau: float
    min_dwell: int = 2
    name: str = "entropy"
    needs: frozenset[str] = field(default=frozenset({"entropy"}))

    def score(self, signals: Signals) -> Scores:
        # NaN, before the first verification, exceeds nothing.
        return order_pair(signals, ar_first=signals.entropy > self.tau, min_dwell=self.min_dwell)


class AutoPolicy:
    """Expected accepted tokens of every arm, from what it says of itself or from running means, of each adapter apart.

    Good without calibration: a weak prior, shared means per context, and the request's own recent rounds. An arm that
    is not chosen and says nothing of itself is probed now and then (`Probes`). If a router with heads is loaded
    (`heads`), its predictions take the means' place and the target's entropy is not computed; nor is it without an arm
    that needs a mean (`passes`).
    """

    candidates = None
    name = "auto"
    prices_batches = True
    joins_arms = True

    def __init__(
        self,
        *,
        heads: bool = False,
        passes: bool = True,
        measured: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """measured: arm → chances that its drafts are right, by place (`AcceptanceByPlace`), where nothing was seen."""
        self.needs = frozenset({"delta"} if heads else {"entropy"} if passes else ())
        places = AcceptanceByPlace(measured or {})
        self.judge, self.accepted = places.observe, places.accepted
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

    def probe(
        self, teachers: Sequence[Signals | None], timings: Timings, loss: Loss = lambda _: math.inf
    ) -> Mapping[int, str]:
        return self._probes.choose(teachers, timings, loss)

    def observe(self, arm: str, decision: Decision, length: float) -> None:
        if arm != arms.NONE and arm not in decision.expected:
            self._known(decision.adapter).observe(arm, decision, length)

    def _known(self, adapter: str | None) -> AcceptanceEstimator:
        """Estimator taught by the rounds of an adapter, or by those without one; a new one begins as the target's."""
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
"""Expected accepted tokens that a preferred arm gains before the request has measured it in this kind of span.

The gain is shared with the rounds that were measured, as if it were one of them: after n rounds it is 1/(n + 1) of
this. Simulated (`tests/routing/test_hinted.py`), a wrong preference costs at most 4 % of the speed; as a constant of
1.5 tokens it cost 2 to 19 %.
"""

RANKS = 1.5
"""The same where a policy measures nothing and only orders its arms: one rank up, and past a tie."""


def apply_hints(
    scores: Mapping[str, float],
    span: Span | None,
    allowed: frozenset[str],
    *,
    off: bool,
    measured: Mapping[str, Mean] | None = None,
) -> tuple[Scores, str]:
    """A policy's scores with the open span's wishes, and what decided: one of `telemetry.tally.REASONS`.

    A pin routes to its arm whatever the policy says. A bias is added as it is. A preference is a belief: what the
    request measures overrules it. Preference and bias move scores of arms that the policy offers; an arm that may
    not draft for the request is never routed to.

    measured: the request's own rounds in this kind of span, by arm; None if the policy reads no measurement.
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


class RandomPolicy(Blind):
    """Switches at random every round. It exists to test that switching never changes text."""

    candidates = None
    name = "random"
    needs: frozenset[str] = frozenset()
    joins_arms = True

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def score(self, signals: Signals) -> Scores:
        choices = sorted(signals.allowed | {arms.NONE})
        return {arm: self._random.random() for arm in choices}
