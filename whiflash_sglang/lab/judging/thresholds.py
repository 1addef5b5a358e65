"""The thresholds at which a router's walk takes the least time.

Replayed rounds are walked with the measured seconds of a round of each drafter; every category weighs the same.
Thresholds are the quantiles of the signal itself, so both ends are the static drafters. Among thresholds within
`PLATEAU` of the best rate the middle one is taken: the top of a noisy curve is flat.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from whiflash_sglang.lab.judging.round_costs import RoundSeconds
from whiflash_sglang.train.replay import ARMS, Replay
from whiflash_sglang.train.rounds import Tally
from whiflash_sglang.train.walk import Choices, choices_above, walk

GRID = 41
PLATEAU = 0.002

Signal = NDArray[np.float64]


class Curve(NamedTuple):
    """`rates` threshold → tokens per second; `chosen` one of the thresholds."""

    rates: dict[float, float]
    chosen: float


class Frame(NamedTuple):
    """Tokens per second of both static drafters, and of the best and the worst drafter of every round in hindsight."""

    eagle3: float
    dflash: float
    oracle: float
    worst: float


def sweep(
    answers: Sequence[Replay],
    signals: Sequence[Signal],
    seconds: RoundSeconds,
    *,
    lowest: float,
    min_dwell: int,
) -> Curve:
    """EAGLE-3 where the signal exceeds the threshold, for a grid of thresholds from `lowest` on.

    Args:
        signals: per answer [P], what is compared with the threshold. seconds: of a round of each drafter.

    Raises:
        ValueError: there is no answer before a loop.
    """
    quantiles = np.quantile(np.concatenate(signals), np.linspace(0, 1, GRID))
    rates = {}
    for threshold in sorted({lowest, *(float(value) for value in quantiles)}):
        choices = [choices_above(signal, threshold) for signal in signals]
        rates[threshold] = _rate(answers, choices, seconds, min_dwell)
    best = max(rates.values())
    level = [threshold for threshold, rate in rates.items() if rate >= best * (1 - PLATEAU)]
    return Curve(rates, level[len(level) // 2])


def frame(answers: Sequence[Replay], seconds: RoundSeconds) -> Frame:
    """What no threshold can change."""
    static = {arm: _rate(answers, [arm] * len(answers), seconds) for arm in ARMS}
    best, worst = max(static.values()), min(static.values())
    for _ in range(
        3
    ):  # Dinkelbach's iteration: the rate that is compared against becomes the rate that results
        best = _rate(answers, [_by_gain(answer, seconds, best, max) for answer in answers], seconds)
        worst = _rate(answers, [_by_gain(answer, seconds, worst, min) for answer in answers], seconds)
    return Frame(static["eagle3"], static["dflash"], best, worst)


def _by_gain(
    answer: Replay, seconds: RoundSeconds, rate: float, choose: Callable[..., str]
) -> dict[int, str]:
    """The drafter whose round gains most (or least) tokens over what `rate` would bring in its time."""
    return {
        i: choose(ARMS, key=lambda arm, i=i: answer.accepted[arm][i] + 1 - rate * seconds[arm])
        for i in range(answer.positions)
    }


def _rate(
    answers: Sequence[Replay], choices: Sequence[Choices | str], seconds: RoundSeconds, min_dwell: int = 0
) -> float:
    """Tokens per second, the mean over the categories."""
    tallies: Mapping[str, Tally] = defaultdict(Tally)
    for answer, choose in zip(answers, choices, strict=True):
        if answer.loop_from:
            walk(answer, choose, 0, answer.loop_from, tallies[answer.category], min_dwell)
    if not tallies:
        raise ValueError("no answer has text before a loop; calibrate with other prompts")
    return float(
        np.mean(
            [
                tally.tokens / sum(rounds * seconds[arm] for arm, rounds in tally.won.items())
                for tally in tallies.values()
            ]
        )
    )
