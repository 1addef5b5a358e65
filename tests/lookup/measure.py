"""Time and memory of the copying arm's host work (docs/dev/lookup.md): `python tests/lookup/measure.py`."""

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from test_index import ADVERSARIAL

from whiflash_sglang.lookup.calibration import MatchCalibration
from whiflash_sglang.lookup.copier import Copier
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.costs import MeasuredCosts
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_sglang.routing.signals import Forecast
from whiflash_sglang.spans.hints import RequestHints

ROUNDS = 400


def microseconds(seconds: Sequence[float], quantile: float) -> float:
    return sorted(seconds)[int(quantile * (len(seconds) - 1))] * 1e6


def measure(name: str, text: Sequence[int]) -> str:
    """One line of the table: the last `ROUNDS` tokens come one a round."""
    copier = Copier(MatchCalibration())
    began = time.perf_counter()
    copier.extend(text[:-ROUNDS])
    indexing = (time.perf_counter() - began) / (len(text) - ROUNDS)
    looks, extends = [], []
    for token in text[-ROUNDS:]:
        began = time.perf_counter()
        proposal = copier.look(16, 0.05)
        sum(proposal.alive)
        looks.append(time.perf_counter() - began)
        began = time.perf_counter()
        copier.extend([token])
        extends.append(time.perf_counter() - began)
    return (
        f"| {name} | {len(text):,} | {indexing * 1e6:.2f} | {microseconds(looks, 0.5):.0f} | "
        f"{microseconds(looks, 0.99):.0f} | {microseconds(extends, 0.5):.1f} | "
        f"{copier.text.nbytes / len(text):.1f} |"
    )


def routing(lookup: bool) -> float:
    """Median µs of routing one request that has nothing to copy, the arm's own work included."""
    rng = random.Random(0)
    costs = MeasuredCosts(lambda arm: 8)
    costs.verified(1, 1, 0.027)
    controller = Controller(AutoPolicy(), costs, ())
    controller.open(0, "r", RequestHints(), [])
    copier = Copier(MatchCalibration())
    copier.extend(rng.sample(range(49152), 4000))
    fresh = rng.sample(range(50_000, 60_000), ROUNDS)
    took = []
    for token in fresh:
        began = time.perf_counter()
        forecast: dict[str, Forecast | None] = {"ar": None, "diffusion": None}
        if lookup:
            copier.extend([token])
            proposal = copier.look(16, 0.05)
            if proposal.tokens:
                forecast["lookup"] = Forecast(1.0 + sum(proposal.alive), 1 + len(proposal.tokens))
        routes = controller.route([0], [forecast])
        took.append(time.perf_counter() - began)
        state = controller.states[0]
        controller.committed(state, state.decision, routes[0], [token], 1)
    return microseconds(took, 0.5)


def main() -> None:
    rng = random.Random(0)
    print(
        "| text | tokens | indexing, µs a token | look, µs (p50) | (p99) | append, µs (p50) | bytes a token |"
    )
    print("|---|---|---|---|---|---|---|")
    print(measure("random tokens: nothing to copy", [rng.randrange(49152) for _ in range(4000)]))
    for name, text in ADVERSARIAL.items():
        print(measure(name, text))
    copiers = [Copier(MatchCalibration()) for _ in range(100)]
    for copier in copiers:
        copier.extend([rng.randrange(300) for _ in range(4000)])
    began = time.perf_counter()
    for copier in copiers:
        copier.look(16, 0.05)
    took = (time.perf_counter() - began) * 1e3
    print(
        f"\n100 requests of 4,000 tokens: {took:.1f} ms for all looks of one round, "
        f"{sum(copier.text.nbytes for copier in copiers) / 2**20:.1f} MiB."
    )
    without, with_it = routing(lookup=False), routing(lookup=True)
    print(
        f"Routing one request with nothing to copy: {without:.0f} µs without the arm, {with_it:.0f} µs with it."
    )


if __name__ == "__main__":
    main()
