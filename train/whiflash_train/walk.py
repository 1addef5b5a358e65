"""Walk static arms, routers and hindsight oracles through replays of held-out answers, round by round."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whiflash_sglang.drafts import arms
from whiflash_train.replay import ALL_ARMS, Replay
from whiflash_train.rounds import RoundTally, rounds

LOOP = "loop"
ORACLE = "oracle"
ORACLE_OF_THREE = "oracle-of-three"

Choices = Mapping[int, str]
"""Answer position → arm of the round that starts there."""


class RouterWalk(NamedTuple):
    """A router's choices: for each answer the arm of every position.

    min_dwell: least rounds with an arm before the next switch. copies: whether the lookup arm is among its arms; then
    it is compared with the oracle of three arms.
    """

    choices: Sequence[Choices]
    min_dwell: int = 0
    copies: bool = False


def walk(
    answer: Replay,
    choose: Choices | Callable[[int], str] | str,
    begin: int,
    end: int,
    tally: RoundTally,
    min_dwell: int = 0,
    learn: Callable[[int, int], None] = lambda ended, emitted: None,
) -> None:
    """Walk answer positions [begin, end) with a fixed arm, or with the arm that `choose` gives for each round.

    An arm changes only after `min_dwell` rounds. tally: counts the rounds and tokens. learn: called with a round's end
    position and emitted tokens before the next round's arm is chosen.
    """
    of = choose.__getitem__ if isinstance(choose, Mapping) else choose
    dwell, previous = 0, None

    def accepted(position: int) -> int:
        nonlocal dwell, previous
        arm = of if isinstance(of, str) else of(position)
        if previous is not None and dwell < min_dwell:
            arm = previous
        dwell, previous = dwell + 1 if arm == previous else 1, arm
        tally.won[arm] += 1
        return answer.drafts_accepted(arm, position)

    for position, emitted in rounds(begin, end, accepted):
        tally.rounds += 1
        tally.tokens += emitted
        learn(position + emitted, emitted)


def best_arms(answer: Replay, among: Sequence[str] = arms.PAIR) -> dict[int, str]:
    """Return the hindsight oracle's choices: position → arm with the most accepted drafts; ties go to the first.

    Arms that were not replayed are ignored.
    """
    among = [arm for arm in among if arm in answer.accepted]
    lengths = np.stack([answer.accepted[arm] for arm in among])
    return {position: among[arm] for position, arm in enumerate(lengths.argmax(0).tolist())}


def choices_above(values: Sequence[float] | NDArray[np.float64], threshold: float) -> dict[int, str]:
    """Choose EAGLE-3 at positions whose value exceeds the threshold, else DFlash; returns position → arm."""
    above = (np.asarray(values) > threshold).tolist()
    return {position: arms.AR if high else arms.DIFFUSION for position, high in enumerate(above)}


def tabulate(answers: Sequence[Replay], routers: Mapping[str, RouterWalk]) -> dict[str, Any]:
    """Compute the figures of every arm, router and oracle, by category and overall.

    Returns:
        {"categories": {category: figures}, "overall": figures, "loop": figures}; `overall` weighs every
        category the same and leaves loops out. Figures: acceptance_length by arm, router and oracle;
        rounds_won (share of all positions at which a drafter accepts strictly more than the other drafter, if there
        are two);
        oracle_gain_share by router, of the gain of its oracle over the better static arm.
    """
    groups: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for index, answer in enumerate(answers):
        if answer.loop_from:
            groups[answer.category].append((index, 0, answer.loop_from))
        if answer.loop_from < answer.positions:
            groups[LOOP].append((index, answer.loop_from, answer.positions))
    figures = {name: _figures(answers, parts, routers) for name, parts in sorted(groups.items())}
    loop = figures.pop(LOOP, None)
    return {"categories": figures, "overall": _mean_figures(list(figures.values()), routers), LOOP: loop}


def _figures(
    answers: Sequence[Replay], parts: Sequence[tuple[int, int, int]], routers: Mapping[str, RouterWalk]
) -> dict[str, Any]:
    trained = tuple(arm for arm in arms.PAIR if arm in answers[0].accepted)
    every = (*trained, arms.LOOKUP)
    walks = {name: RoundTally() for name in (*every, *routers, ORACLE, ORACLE_OF_THREE)}
    pair = trained if len(trained) == 2 else ()
    strictly = dict.fromkeys(pair, 0)
    positions = 0
    for index, begin, end in parts:
        answer = answers[index]
        for arm in every:
            walk(answer, arm, begin, end, walks[arm])
        for name, router in routers.items():
            walk(answer, router.choices[index], begin, end, walks[name], router.min_dwell)
        walk(answer, best_arms(answer), begin, end, walks[ORACLE])
        walk(answer, best_arms(answer, ALL_ARMS), begin, end, walks[ORACLE_OF_THREE])
        for arm, other in zip(pair, reversed(pair), strict=True):
            better = answer.accepted[arm][begin:end] > answer.accepted[other][begin:end]
            strictly[arm] += int(better.sum())
        positions += end - begin
    lengths = {name: tally.acceptance_length for name, tally in walks.items()}
    return {
        "answers": len(parts),
        "positions": positions,
        "acceptance_length": lengths,
        "rounds_won": {arm: count / positions for arm, count in strictly.items()},
        "oracle_gain_share": _gain_shares(lengths, routers),
    }


def _gain_shares(lengths: Mapping[str, float], routers: Mapping[str, RouterWalk]) -> dict[str, float | None]:
    shares: dict[str, float | None] = {}
    for name, router in routers.items():
        among = ALL_ARMS if router.copies else arms.PAIR
        static = max(lengths[arm] for arm in among if arm in lengths)
        gain = lengths[ORACLE_OF_THREE if router.copies else ORACLE] - static
        shares[name] = (lengths[name] - static) / gain if gain > 0 else None
    return shares


def _mean_figures(parts: Sequence[dict[str, Any]], routers: Mapping[str, RouterWalk]) -> dict[str, Any]:
    def mean(key: str) -> dict[str, float]:
        return {name: float(np.mean([figures[key][name] for figures in parts])) for name in parts[0][key]}

    lengths = mean("acceptance_length")
    return {
        "answers": sum(figures["answers"] for figures in parts),
        "positions": sum(figures["positions"] for figures in parts),
        "acceptance_length": lengths,
        "rounds_won": mean("rounds_won"),
        "oracle_gain_share": _gain_shares(lengths, routers),
    }
