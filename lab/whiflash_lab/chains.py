"""Tables of `results/simulated-h200.md`: `auto` beside chains, blocks and stock plain decoding, and its starts."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from whiflash_lab.cards import DRAFTS, FittedCard, recorded
from whiflash_lab.simulate import PublishedPair, SimulatedLoad, Simulation
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.rates import continuing

LENGTHS = (1.05, 1.3, 1.6, 2.11, 3.0, 4.5, 6.0)
"""Tokens per round of a block on `FittedCard`; a chain's drafts are right as often as a block's."""
CHAINS = ("plain", "eagle3 2", "eagle3 3", "eagle3", "dflash")
PLAIN_LENGTH = 1.3
"""Largest number of tokens per block for which plain decoding may be the fastest."""
STEADY, STARTS = (400, 1500), 8
"""First and last round of a rate of `auto`; number of runs over which a start is averaged."""


def _of_length(card: FittedCard, length: float, requests: int, method: str, rounds: int, **run: Any) -> Simulation:
    pair = PublishedPair({"one": dict.fromkeys(DRAFTS, length)}, dict.fromkeys(DRAFTS, DRAFTS[arms.DIFFUSION]), DRAFTS)
    simulation = Simulation(card, SimulatedLoad(requests, 1 << 40, 1024, 192), method, pair=pair, **run)
    simulation.run(rounds)
    return simulation


def beside_chains(card: FittedCard, length: float, requests: int) -> list[float]:
    """Return tokens per second of stock plain decoding, of each of `CHAINS` and of `auto`; then `auto` over the fastest
    of `CHAINS` and over stock plain decoding. length: a block's tokens per round.
    """
    stock = requests / card.stock(requests, requests * 1120)
    fixed = [_of_length(card, length, requests, method, STEADY[0]).rate(0) for method in CHAINS]
    auto = _of_length(card, length, requests, "auto", STEADY[1]).rate(STEADY[0])
    return [stock, *fixed, auto, auto / max(fixed), auto / stock]


def starts(card: FittedCard, length: float, *, measured: bool) -> list[float]:
    """Return the rate of `auto` over the fastest of `CHAINS`, in rounds 1 to 50 and 1 to 200 of one request after a
    start, over `STARTS` runs. measured: whether the bundle holds measured acceptance.
    """
    chance = continuing(length, DRAFTS[arms.DIFFUSION] + 1)
    known = {"measured": {arm: (chance,) * drafts for arm, drafts in DRAFTS.items()}} if measured else {}

    def rate(method: str, rounds: int, **known: Any) -> float:
        runs = (_of_length(card, length, 1, method, rounds, seed=seed, **known) for seed in range(STARTS))
        tokens, seconds = map(sum, zip(*(each for run in runs for each in run.trace), strict=True))
        return tokens / seconds

    return [rate("auto", rounds, **known) / max(rate(method, rounds) for method in CHAINS) for rounds in (50, 200)]


def tables_of_chains(figures: Path, sizes: Sequence[int]) -> Iterator[str]:
    """Yield the lines of two tables: rates of `auto` beside fixed chains, by length and requests; and of starts."""
    card, stock = FittedCard(recorded(figures)), FittedCard(recorded(figures), own_plain=False)
    names = "stock plain | our plain | chain 2 | chain 3 | chain 4 | block 15 | `auto` | of the best | of stock"
    yield f"| tokens a block | requests | {names} | of stock, its kernel |"
    yield "|" + " ---: |" * 12
    for length, n in product(LENGTHS, sizes):
        *rates, best, over = beside_chains(card, length, n)
        other = f"{beside_chains(stock, length, n)[-1]:.2f}" if length <= PLAIN_LENGTH else ""
        cells = [f"{length:g}", str(n), *(f"{rate:,.0f}" for rate in rates), f"{best:.2f}", f"{over:.2f}", other]
        yield f"| {' | '.join(cells)} |"
    yield "\n| tokens a block | rounds 1 to 50 | 1 to 200 | with measured acceptance, 1 to 50 | 1 to 200 |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for length in LENGTHS:
        shares = [share for measured in (False, True) for share in starts(card, length, measured=measured)]
        yield f"| {length:g} | {' | '.join(f'{share:.2f}' for share in shares)} |"
