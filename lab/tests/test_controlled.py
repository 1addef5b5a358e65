"""`auto` offline is the server's own controller."""

import numpy as np
import pytest
import torch

from whiflash_lab.evaluation import KnownSignals, auto_choices
from whiflash_train.replay import JOINED, Replay
from whiflash_train.walk import RouterWalk, tabulate

SIZE = 240
NOTHING = KnownSignals([0.0] * SIZE, [])


def answer(eagle3: int, dflash: int, copied: int = 0, loop_from: int = SIZE) -> Replay:
    drafted = {"ar": eagle3, "diffusion": dflash}
    lengths = {**drafted, **{JOINED[arm]: length for arm, length in drafted.items()}, "lookup": copied}
    accepted = {arm: np.full(SIZE, length) for arm, length in lengths.items()}
    copies = np.full(SIZE, float(copied))
    return Replay("a", "chat", accepted, torch.zeros(SIZE, 2), loop_from, copies, copies.astype(int))


def most_used(choices: dict[int, str]) -> str:
    arms = list(choices.values())
    return max(set(arms), key=arms.count)


@pytest.mark.parametrize(
    ("replay", "arm"),
    [(answer(4, 1), "ar+lookup"), (answer(1, 4), "diffusion+lookup"), (answer(1, 1, copied=9), "lookup")],
)
def test_it_comes_to_the_best_arm(replay: Replay, arm: str) -> None:
    (choices,) = auto_choices([replay], [NOTHING])
    assert most_used(choices) == arm


@pytest.mark.parametrize("arm", ["ar", "diffusion"])
def test_it_walks_with_one_drafter_alone(arm: str) -> None:
    """And does not come to an arm that was not replayed, whatever that would promise unseen."""
    replay = answer(3, 3)
    for missing in {"ar", "diffusion"} - {arm}:
        del replay.accepted[missing], replay.accepted[JOINED[missing]]
    (choices,) = auto_choices([replay], [NOTHING])
    assert most_used(choices) == JOINED[arm]
    assert set(choices.values()) <= {JOINED[arm], "lookup", "none"}


def taking_turns() -> tuple[Replay, KnownSignals]:
    """The drafters take turns every five tokens, and the heads say so; means over the answer could not know."""
    even = np.arange(SIZE) % 10 < 5
    drafted = {"ar": np.where(even, 4, 0), "diffusion": np.where(even, 0, 4)}
    joined = {JOINED[arm]: lengths for arm, lengths in drafted.items()}
    accepted = {**drafted, **joined, "lookup": np.zeros(SIZE, int)}
    nothing = np.zeros(SIZE)
    replay = Replay("a", "chat", accepted, torch.zeros(SIZE, 2), SIZE, nothing, nothing.astype(int))
    heads = [[4.0, 4.0, 0.0] if first else [-4.0, 0.0, 4.0] for first in even]
    return replay, KnownSignals([0.0] * SIZE, heads)


def length_with(replay: Replay, known: KnownSignals) -> float:
    walk = RouterWalk(auto_choices([replay], [known]), copies=True)
    figures = tabulate([replay], {"auto": walk})["overall"]["acceptance_length"]
    return float(figures["auto"])


def test_heads_decide_the_round_they_speak_of() -> None:
    replay, known = taking_turns()
    assert length_with(replay, known) > 4.5 > length_with(replay, NOTHING)


def test_loops_are_walked_on_their_own() -> None:
    replay = answer(4, 1, loop_from=101)
    walk = RouterWalk(auto_choices([replay], [NOTHING]), copies=True)
    figures = tabulate([replay], {"auto": walk})
    assert figures["loop"]["acceptance_length"]["auto"] > 4
