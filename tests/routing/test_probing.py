"""How often `auto` tries what it does not use: seldom, the less often the better it is known."""

from itertools import pairwise
from math import inf

import pytest

from whiflash_sglang.drafts.candidates import Forecast
from whiflash_sglang.prices.costs import PROBE_ROUNDS
from whiflash_sglang.records.signals import Signals
from whiflash_sglang.routing.policies import FIRST_PROBE, HOPELESS, AutoPolicy

BOTH = frozenset({"ar", "diffusion"})


def in_use(arm: str, round_number: int) -> Signals:
    """A request that drafts with `arm` in every round."""
    return Signals(allowed=BOTH, rounds=round_number, last={arm: round_number - 1} if round_number else {})


def rounds_with_probes(rounds: int, batch: int, accepted: int = 2, loss: float = inf) -> list[tuple[int, int]]:
    """Rounds in which DFlash was probed, and by how many requests; EAGLE-3 is used otherwise and is far better.

    accepted: DFlash's acceptance length. loss: share of its tokens that a probe costs.
    """
    policy, found = AutoPolicy(), []
    for number in range(rounds):
        probes = policy.probe([in_use("ar", number) for _ in range(batch)], lambda _: loss)
        probed = [index for index, arm in probes.items() if arm == "diffusion"]
        if probed:
            found.append((number, len(probed)))
        for index in range(batch):
            arm = probes.get(index, "ar")
            policy.observe(arm, Signals(allowed=BOTH), 6 if arm == "ar" else accepted)
    return found


def test_the_first_probe_comes_soon_and_the_next_ones_ever_later() -> None:
    probes = [number for number, _ in rounds_with_probes(1500, batch=1)]
    gaps = [after - before for before, after in pairwise(probes)]
    assert probes[0] == FIRST_PROBE
    assert all(after >= before for before, after in pairwise(gaps))
    assert gaps[0] <= 3 * FIRST_PROBE
    assert max(gaps) == gaps[-1] == PROBE_ROUNDS + 1


@pytest.mark.parametrize(("accepted", "rounds"), [(1, PROBE_ROUNDS / HOPELESS), (2, PROBE_ROUNDS), (5, PROBE_ROUNDS)])
def test_what_is_never_right_is_tried_most_seldom(accepted: int, rounds: float) -> None:
    probes = [number for number, _ in rounds_with_probes(8000, batch=1, accepted=accepted)]
    assert probes[-1] - probes[-2] == rounds + 1
    assert probes[-1] > 8000 - 2 * rounds, "it is never given up"


def test_what_is_never_right_is_tried_less_often_from_the_start_and_whatever_it_costs() -> None:
    right, wrong = (rounds_with_probes(600, batch=1, accepted=accepted) for accepted in (2, 1))
    assert len(wrong) <= len(right) - 2


@pytest.mark.parametrize(("loss", "rounds"), [(0.9, PROBE_ROUNDS), (0.3, 200), (0.01, PROBE_ROUNDS / 4)])
def test_an_arm_that_is_hardly_behind_is_tried_more_often(loss: float, rounds: float) -> None:
    """Never so often that its probes cost more than `PROBES_SHARE`."""
    probes = [number for number, _ in rounds_with_probes(8000, batch=1, loss=loss)]
    assert probes[-1] - probes[-2] == rounds + 1


@pytest.mark.parametrize(("batch", "requests"), [(3, 1), (16, 8), (256, 16)])
def test_half_of_a_batch_probes_together_as_seldom_as_one_request_would(batch: int, requests: int) -> None:
    found = rounds_with_probes(1500, batch)
    assert {count for _, count in found} == {requests}
    numbers = [number for number, _ in found]
    assert numbers[0] == FIRST_PROBE
    assert max(after - before for before, after in pairwise(numbers)) == PROBE_ROUNDS + 1
    assert len(found) <= len(rounds_with_probes(1500, batch=1)) + 1


def test_whoever_went_without_it_longest_tries_it() -> None:
    """One request that never ends does not take every probe: in turn all of them do."""
    policy, last = AutoPolicy(), [dict[str, int]() for _ in range(3)]
    tried = []
    for number in range(PROBE_ROUNDS * 6):
        signals = [Signals(allowed=BOTH, rounds=number, last={**seen, "ar": number - 1}) for seen in last]
        for index, arm in policy.probe(signals, lambda _: 10**6).items():
            last[index][arm] = number
            tried.append((arm, index))
            policy.observe(arm, signals[index], 2)
    assert {arm for arm, _ in tried} == {"diffusion"}
    turns = [index for _, index in tried]
    assert turns[:3] == [0, 1, 2]
    assert max(turns.count(index) for index in range(3)) - min(turns.count(index) for index in range(3)) <= 1


def test_what_says_what_it_expects_is_never_tried() -> None:
    """It learns from every round. Another request's arm of that name, which says nothing yet, is tried like any."""
    policy, tells = AutoPolicy(), {"diffusion": Forecast(1.1, 2)}
    for number in range(1, 3000):
        signals = Signals(allowed=BOTH, rounds=number, last={"ar": number - 1}, expected=tells)
        assert not policy.probe([signals], lambda _: 0)
        policy.observe("diffusion", signals, 9)
    assert policy.estimator.rounds("diffusion") == 0
    later = [policy.probe([signals, in_use("ar", 3000 + more)], lambda _: 0) for more in range(FIRST_PROBE + 1)]
    assert later == [{}] * FIRST_PROBE + [{1: "diffusion"}]


def share_of_probes(adapters: int, *, known: int, batch: int = 8, answer: int = 150, rounds: int = 4000) -> float:
    """Share of `rounds` rounds in which EAGLE-3 is probed, whereas DFlash is used and far better.

    adapters: which the requests take in turn; 0: none. known: rounds of the target's before. answer: rounds of a
    request; they end one by one.
    """
    policy, probes, begun = AutoPolicy(), 0, 0
    running: list[tuple[Signals, dict[str, int]]] = []
    for number in range(known + rounds):
        if number in (0, known):
            running, begun = [], 0
        while len(running) < batch or running[0][0].rounds >= answer:
            last = dict[str, int]()
            adapter = f"of {begun % adapters}" if adapters and number >= known else None
            age = answer // batch * (batch - begun - 1) if begun < batch else 0
            running.append((Signals(allowed=BOTH, rounds=age, last=last, adapter=adapter), last))
            running, begun = running[-batch:], begun + 1
        probed = policy.probe([signals for signals, _ in running], lambda _: 10**6)
        probes += number >= known and "ar" in probed.values()
        for index, (signals, last) in enumerate(running):
            arm = probed.get(index, "diffusion")
            last[arm] = signals.rounds
            policy.observe(arm, signals, 5 if arm == "diffusion" else 2)
            signals.rounds += 1
    return probes / rounds


@pytest.mark.parametrize("known", [4000, 0])
def test_many_adapters_probe_hardly_more_often_than_none(known: int) -> None:
    """Neither as each is new, nor as more come and go than are kept, nor if the target itself is never asked."""
    none = share_of_probes(0, known=known)
    assert 0 < none < 0.006
    for adapters in (64, 128):
        assert none / 2 < share_of_probes(adapters, known=known) <= 2 * none
