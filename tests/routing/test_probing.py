"""How often `auto` tries what it does not use: seldom, the less often the better it is known, one request at a time."""

from itertools import pairwise

import pytest

from whiflash_sglang.routing.policies import FIRST_PROBE, HOPELESS, PROBE_ROUNDS, PROBE_SCORE, AutoPolicy
from whiflash_sglang.routing.signals import Signals

BOTH = frozenset({"ar", "diffusion"})


def rounds_with_probes(rounds: int, batch: int, accepted: int = 2) -> list[tuple[int, int]]:
    """Rounds in which DFlash was probed, and by how many requests; EAGLE-3 is used otherwise and is far better.

    accepted: DFlash's acceptance length.
    """
    policy, found = AutoPolicy(), []
    for number in range(rounds):
        scores = [policy.score(Signals(10, BOTH)) for _ in range(batch)]
        routes = ["diffusion" if s["diffusion"] == PROBE_SCORE else "ar" for s in scores]
        if "diffusion" in routes:
            found.append((number, routes.count("diffusion")))
        policy.routed(routes)
        for arm in routes:
            policy.observe(arm, Signals(10, BOTH), 6 if arm == "ar" else accepted)
    return found


def test_the_first_probe_comes_soon_and_the_next_ones_ever_later() -> None:
    probes = [number for number, _ in rounds_with_probes(1500, batch=1)]
    gaps = [after - before for before, after in pairwise(probes)]
    assert probes[0] == FIRST_PROBE
    assert all(after >= before for before, after in pairwise(gaps))
    assert gaps[0] <= 3 * FIRST_PROBE
    assert max(gaps) == gaps[-1] == PROBE_ROUNDS + 1


@pytest.mark.parametrize(
    ("accepted", "rounds"), [(1, PROBE_ROUNDS / HOPELESS), (2, PROBE_ROUNDS), (5, PROBE_ROUNDS)]
)
def test_what_is_never_right_is_tried_most_seldom(accepted: int, rounds: float) -> None:
    probes = [number for number, _ in rounds_with_probes(8000, batch=1, accepted=accepted)]
    assert probes[-1] - probes[-2] == rounds + 1
    assert probes[-1] > 8000 - 2 * rounds, "it is never given up"


def test_a_batch_is_no_reason_to_probe_more_often() -> None:
    assert rounds_with_probes(600, batch=16) == rounds_with_probes(600, batch=1)


def test_a_probe_that_was_not_followed_is_still_due() -> None:
    policy = AutoPolicy()
    for _ in range(FIRST_PROBE):
        policy.score(Signals(10, BOTH))
        policy.routed(["ar"])
    for _ in range(3):
        assert policy.score(Signals(10, BOTH))["diffusion"] == PROBE_SCORE
        policy.routed(["ar"])
