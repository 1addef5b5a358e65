"""The model of a card beside its host, by hosts of a known pace."""

import pytest
from host_pace import SETTLED, HostRound, shortest, waits


@pytest.mark.parametrize(
    ("host", "forward"),
    [
        (HostRound(0.0, 0.0, 0.0, drafting=0.001), 0.0),
        (HostRound(0.002, 0.002, 0.001), 0.005),
        (HostRound(0.002, 0.002, 0.001, drafting=0.003), 0.002),
        (HostRound(0.002, 0.002, 0.001, 0.001, 0.003), 0.006),  # masks wait for the drafts
        (HostRound(0.0, 0.0, 0.0, masks=0.006), 0.006),  # and the round waits for them
    ],
)
def test_a_forward_that_hides_the_hosts_pass_never_waits(host: HostRound, forward: float) -> None:
    assert shortest([host] * 64) == pytest.approx(1000 * forward, rel=0.03)
    expected = 0.2 * forward / (forward + host.drafting)
    assert waits([host] * 64, 0.8 * forward) == pytest.approx(expected)


def test_a_slow_round_waits_for_what_the_forward_before_it_does_not_hide() -> None:
    rounds = [HostRound(0.010 if number == 20 else 0.001, 0.0, 0.0) for number in range(40)]
    assert waits(rounds, 0.004) == pytest.approx(0.006 / (0.004 * (40 - SETTLED) + 0.006))
