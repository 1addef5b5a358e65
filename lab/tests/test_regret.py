"""How far `auto` is behind the best fixed arm, in random worlds of chances, prices, loads and the host's time.

The best arm is known only afterwards, so it is an oracle. Both meet the same texts. Estimates, like all that is
simulated. `python lab/tests/test_regret.py 200` prints the mean, the worst, and what probes cost.
"""

import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from whiflash_lab.cards import DRAFTS, H100, Card, FittedCard, recorded
from whiflash_lab.simulate import FIXED, Host, PublishedPair, SimulatedLoad, Simulation
from whiflash_sglang.drafts import arms

MOST, MOST_PROBES = 0.01, 0.003
"""Shares of the best arm's tokens a second that may be lost, and that probes may cost."""


def regret(number: int, rounds: int = 40_000) -> tuple[str, float, float, float]:
    """A world; the share of the rate of the best fixed arm, chains of two and three among them, that `auto` is behind
    there; `Result.probes`; and `auto`'s rate over that of stock plain decoding, 1 where no card has both.
    """
    luck = random.Random(number)

    def between(low: float, high: float) -> float:
        return low * (high / low) ** luck.random()

    kind = number % 3
    requests = round(between(1, 48 if kind == 1 else 256))
    drafts = DRAFTS if kind else {arms.AR: luck.randint(3, 7), arms.DIFFUSION: luck.choice((7, 15))}
    skill = {arm: between(0.5, 2) for arm in drafts}
    lengths = {}
    for text in range(luck.randint(1, 4)):
        easy = between(0.3, 3)  # for every drafter, though not for each alike
        lengths[f"text {text}"] = {
            arm: 1 + min(easy * skill[arm] * between(0.6, 1.6), 0.8 * drafts[arm]) for arm in drafts
        }
    fixed, row, chain = between(1e-3, 15e-3), between(3e-6, 100e-6), between(1e-4, 1e-3)
    h200 = FittedCard(recorded(Path(__file__).parents[2] / "results/gpu/shaped.json"))
    card = (Card("drawn", fixed, row, 2e-7, chain, between(3e-4, 4e-3)), h200, H100)[kind]
    host = Host(between(1e-4, 4e-3), between(5e-6, 3e-4))
    load = SimulatedLoad(requests, max(min(rounds, 4000 * requests) // 128, 3 * requests), 256, 512)
    pair = PublishedPair(lengths, drafts, drafts)
    rivals = (*FIXED, "eagle3 2", "eagle3 3")
    runs = {method: Simulation(card, load, method, number, pair, host).run() for method in (*rivals, "auto")}
    best = max(rivals, key=lambda method: runs[method].rate)
    world, rate = f"world {number}: {card.name}, {requests} requests, {best}", runs["auto"].rate
    stock = requests / h200.stock(requests, requests * 512) if kind == 1 else rate
    return world, 1 - rate / runs[best].rate, runs["auto"].probes, rate / stock


@pytest.mark.parametrize("number", [9, 10, 18, 31, 32, 34, 57])
def test_auto_is_hardly_behind_the_best_fixed_arm(number: int) -> None:
    world, lost, probes, _ = regret(number, rounds=8000)
    assert lost < MOST, world
    assert probes < MOST_PROBES, world


def main() -> None:
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(regret, range(int(sys.argv[1]))))
    for world, share, cost, over in found:
        if share > MOST or cost > MOST_PROBES or over < 1 - MOST:
            print(f"{world}: {share:+.1%}, probes {cost:.2%}, {over:.2f} of stock plain decoding")
    worlds, lost, probes, overs = zip(*found, strict=True)
    above = sum(each > MOST for each in lost)
    print(f"{len(worlds)} worlds: mean {sum(lost) / len(lost):+.2%}, worst {max(lost):+.2%}, {above} above {MOST:.0%}")
    print(f"slower than stock plain decoding: {sum(over < 1 for over in overs)}, at worst {min(overs):.2f}")
    print(f"probes: {sum(probes) / len(probes):.2%} of tokens, at most {max(probes):.2%}")


if __name__ == "__main__":
    main()
