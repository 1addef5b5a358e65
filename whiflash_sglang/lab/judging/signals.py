"""Signals that could show before a round which drafter will accept more, judged on the same positions of an answer.

A signal speaks for EAGLE-3 the larger it is. Each is judged at the threshold that suits it best on these very answers,
so that what differs is how much it knows.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from whiflash_sglang.routing.signals import Mean
from whiflash_sglang.train.replay import ARMS, Replay
from whiflash_sglang.train.rounds import Tally
from whiflash_sglang.train.router import best_accuracy
from whiflash_sglang.train.walk import Choices, choices_above, walk

GRID = 41
PLATEAU = 0.002

Signal = NDArray[np.float64]

RoundSeconds = Mapping[str, float]
"""Drafter (`eagle3`, `dflash`) → seconds of one round, alone in the batch."""


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
    """EAGLE-3 where the signal exceeds the threshold, for a grid of thresholds from `lowest` on: that at which the walk
    takes the least time is chosen.

    Every category weighs the same. Thresholds are the quantiles of the signal itself, so both ends are the static
    drafters. Among thresholds within `PLATEAU` of the best rate the middle one is taken: the top of a noisy curve is
    flat.

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


MEMORY = 16.0
"""Positions that the running means remember."""

ALWAYS = "always the same"
EQUAL = dict.fromkeys(ARMS, 1.0)
"""Rounds cost the same, so that rates are acceptance lengths."""


def signals_of(
    answers: Sequence[Replay],
    entropies: Sequence[Sequence[float]],
    deltas: Sequence[Sequence[float]] | None,
    longest: int,
) -> dict[str, list[Signal]]:
    """Signal → its values [P] in every answer.

    The drafters' own confidences are what a round would see behind both draft passes and before the verification.

    Args:
        entropies: the target's, in nats. deltas: ΔAL as the router predicts it, None without one. longest: drafts of a
            round, of either drafter, at most.
    """
    eagle3, dflash = ARMS
    found: dict[str, list[Signal]] = {"entropy": [np.asarray(one, np.float64) for one in entropies]}
    if deltas is not None:
        found["neural"] = [np.asarray(one, np.float64) for one in deltas]
    found["running means"] = [running_means(answer, longest) for answer in answers]
    found[f"confidence of {eagle3}"] = [answer.expected[eagle3] for answer in answers]
    found[f"confidence of {dflash}"] = [-answer.expected[dflash] for answer in answers]
    found["both confidences"] = [answer.expected[eagle3] - answer.expected[dflash] for answer in answers]
    return found


def running_means(answer: Replay, longest: int) -> Signal:
    """[P]: mean ΔAL of the rounds that could have begun before and are known by now, decayed; 0 where there are none.

    It knows both drafters' rounds at every position, which no server does: a bound on what means can show.
    """
    delta = answer.accepted[ARMS[0]] - answer.accepted[ARMS[1]]
    mean, values = Mean(), np.zeros(len(delta))
    for position in range(len(delta)):
        known = position - 1 - longest  # the last round whose drafts are all in the text so far
        if known >= 0:
            mean.add(float(delta[known]), MEMORY)
            values[position] = mean.value
    return values


def judge(answers: Sequence[Replay], signals: Mapping[str, Sequence[Signal]]) -> dict[str, dict[str, float]]:
    """Signal → figures, before loops; `ALWAYS` names the drafter that is better more often, or is longer.

    sign_accuracy: where one drafter accepts more, how often the signal names it. acceptance_length: routed by it,
    categories weighted alike. oracle_gain_share: of the best of two's gain over the better drafter. nan where nothing
    differs.

    Raises:
        ValueError: there is no answer before a loop.
    """
    around = frame(answers, EQUAL)
    static, gain = max(around.eagle3, around.dflash), around.oracle - max(around.eagle3, around.dflash)
    delta = _before_loops(answers, [one.accepted[ARMS[0]] - one.accepted[ARMS[1]] for one in answers])
    decided, positive = delta != 0, delta[delta != 0] > 0
    share = positive.double().mean().item()
    figures = {ALWAYS: _figures(max(share, 1 - share), static, static, gain)}
    for name, values in signals.items():
        signal = _before_loops(answers, values)[decided]
        accuracy = best_accuracy(signal, positive) if len(signal) else float("nan")
        lowest = min(float(one.min()) for one in values) - 1.0
        curve = sweep(answers, values, EQUAL, lowest=lowest, min_dwell=0)
        figures[name] = _figures(accuracy, max(curve.rates.values()), static, gain)
    return figures


def _figures(accuracy: float, length: float, static: float, gain: float) -> dict[str, float]:
    share = (length - static) / gain if gain > 0 else float("nan")
    return {"sign_accuracy": accuracy, "acceptance_length": length, "oracle_gain_share": share}


def _before_loops(answers: Sequence[Replay], values: Sequence[Any]) -> torch.Tensor:
    return torch.from_numpy(
        np.concatenate([one[: answer.loop_from] for answer, one in zip(answers, values, strict=True)])
    )


def signals_table(result: Mapping[str, Mapping[str, float]]) -> Table:
    """For a terminal."""
    table = Table(title="signals of which drafter accepts more, each at its best threshold")
    for column in ("signal", "names the better one", "tokens per round", "share of the oracle's gain"):
        table.add_column(column, justify="left" if column == "signal" else "right")
    for name, one in result.items():
        length, share = one["acceptance_length"], one["oracle_gain_share"]
        table.add_row(name, f"{one['sign_accuracy']:.1%}", f"{length:.3f}", f"{share:.0%}")
    return table
