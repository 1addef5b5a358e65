"""`score(signals) → expected accepted tokens per arm`, one policy a class.

A policy judges one request and knows nothing of the batch; `assign` turns the scores of a whole batch into routes.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from whiflash_sglang import arms
from whiflash_sglang.routing.estimate import AcceptanceEstimator
from whiflash_sglang.routing.probes import Probes
from whiflash_sglang.routing.signals import Signals

Scores = Mapping[str, float]
"""Arm → expected accepted tokens a round, bonus token included. An arm that is absent must not be used."""

PAIR = frozenset({arms.AR, arms.DIFFUSION})
"""What the paper's routers choose from."""

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
        """Whether an arm's drafts may be prolonged by what another one knows to follow (a copy behind a chain)."""
        ...

    def score(self, signals: Signals) -> Scores:
        """Expected accepted tokens per allowed arm; `none` is always there, so that a route always exists."""
        ...

    def probe(self, free: Sequence[Signals | None], timings: Callable[[str], int]) -> Mapping[int, str]:
        """A round of the whole batch begins: requests, by their index, that are to try an arm whatever it promises.

        free: of every request, None where its caller ordered the route. timings: how often an arm's price was found
        right.
        """
        ...

    def observe(self, arm: str, signals: Signals, length: int) -> None:
        """A request's round of `arm`, decided on `signals`, committed `length` tokens; its caller ordered nothing."""
        ...


class Blind:
    """What policies have in common that only order arms and learn nothing while serving."""

    candidates: frozenset[str] | None = PAIR
    prices_batches = False
    joins_arms = False

    def probe(self, free: Sequence[Signals | None], timings: Callable[[str], int]) -> Mapping[int, str]:
        """Nothing to try."""
        return {}

    def observe(self, arm: str, signals: Signals, length: int) -> None:
        """Nothing to learn."""


def order_pair(signals: Signals, *, ar_first: bool, min_dwell: int) -> Scores:
    """EAGLE-3 before DFlash or the other way round, plain decoding last; a drafter in use fewer than `min_dwell`
    rounds stays first.
    """
    order = [arms.AR, arms.DIFFUSION] if ar_first else [arms.DIFFUSION, arms.AR]
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
class CopyRule(Blind):
    """The plain rule that better policies are measured against: copy where there is something to copy, else EAGLE-3."""

    candidates = frozenset({arms.LOOKUP, arms.AR})
    name: str = "copy-rule"
    needs: frozenset[str] = frozenset()

    def score(self, signals: Signals) -> Scores:
        return in_order((arms.LOOKUP, arms.AR), signals)


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


class AutoPolicy:
    """Expected accepted tokens of every arm, from what it says of itself or from running means.

    Good without calibration: a weak prior, shared means per context, and the request's own recent rounds. An arm that
    is not chosen and says nothing of itself is probed now and then (`Probes`). Where a router with heads is loaded
    (`heads`), its predictions take the means' place and the target's entropy is not computed.
    """

    candidates = None
    name = "auto"
    prices_batches = True
    joins_arms = True

    def __init__(self, *, heads: bool = False) -> None:
        self.needs = frozenset({"delta"} if heads else {"entropy"})
        self.estimator = AcceptanceEstimator()
        self._probes = Probes(self.estimator)

    def score(self, signals: Signals) -> Scores:
        return {**{arm: self._expect(arm, signals) for arm in sorted(signals.allowed)}, arms.NONE: 1.0}

    def probe(self, free: Sequence[Signals | None], timings: Callable[[str], int]) -> Mapping[int, str]:
        return self._probes.choose(free, timings)

    def observe(self, arm: str, signals: Signals, length: int) -> None:
        if arm != arms.NONE and arm not in signals.expected:
            self.estimator.observe(arm, signals, length)

    def _expect(self, arm: str, signals: Signals) -> float:
        if arm in signals.expected:
            return signals.expected[arm].length
        return self.estimator.expect(arm, signals)
