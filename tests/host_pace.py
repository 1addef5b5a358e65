"""The shortest forward at which a card never waits for its host: `make host`, which writes `results/host.md`.

The host's CPU time is measured: agents' rounds are planned before the last one's results are known, masked, and learned
from; SGLang's scheduler runs a tiny target. The card is a model: drafter passes at an H200's prices, then a forward, in
the order of SGLang's overlap loop. Prices follow that card with its own forward. Left out are prefills and launches.
"""

import argparse
import gc
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from planning_time import Agents
from pydantic import TypeAdapter

from whiflash_sglang.files.provenance import busy, made_by
from whiflash_sglang.prices.round_clock import RoundTime
from whiflash_sglang.prices.tables import CostTables
from whiflash_sglang.records.core import Results, Round

RESULTS = Path(__file__).parents[1] / "results"
NEVER, FORWARDS = 0.01, (0.5, 1, 2, 4, 8, 16)
"""A card that waits for less of its time never waits, since rounds differ. Forwards, in ms, of which that is shown."""
SETTLED, ROUNDS, RUNS, PASSES = 8, 100, 3, 16
"""Rounds before those that count, and rounds that do. Equal runs: the least of each part counts. Passes of the
scheduler."""


class HostRound(NamedTuple):
    """Seconds of a pass: the host's, and the card's before its forward."""

    scheduler: float
    planning: float
    learning: float
    masks: float = 0.0  # 0 if nothing is under a grammar; else from the drafts on, and the round ends behind them
    drafting: float = 0.0


def waits(rounds: Sequence[HostRound], forward: float) -> float:
    """Share of the time in which a card with such a forward, in seconds, has nothing to do."""
    host = card = settled = waited = 0.0
    for number, each in enumerate(rounds):
        if number == SETTLED:
            settled, waited = card, 0.0
        host += each.scheduler + each.planning
        waited += max(host - card, 0.0)
        drafted = max(host, card) + each.drafting
        ended = drafted + forward
        if each.masks:
            host = max(host, drafted) + each.masks
            waited += max(host - ended, 0.0)
            ended = max(host, ended)
        host, card = max(host, card) + each.learning, ended  # from the last round, which ended at `card`
    return waited / (card - settled)


def shortest(rounds: Sequence[HostRound]) -> float:
    """Milliseconds of the shortest forward at which the card never waits."""
    return bisect_left(range(10**6), True, key=lambda us: waits(rounds, us / 1e6) <= NEVER) / 1000


class OverlappedAgents(Agents):
    """Agents in the order of the overlap loop. `step` is a pass but for the scheduler."""

    def __init__(self, size: int, prices: dict[str, Any]) -> None:
        from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

        super().__init__(size, timed=False)
        self.tables = TypeAdapter(CostTables).validate_python(prices, strict=False)
        self.planner.controller.costs.tables = self.tables
        self.last: tuple[Round, Results] | None = None
        reqs = []
        for req in self.requests:
            grammar = req.grammar and XGrammarGrammar(req.grammar.raw, self.vocabulary, None, None)
            reqs.append(SimpleNamespace(rid=req.rid, grammar=grammar))
        self.served = SimpleNamespace(reqs=reqs, sampling_info=SimpleNamespace(vocab_size=self.vocabulary))

    def step(self) -> HostRound:
        from whiflash_sglang.engine.forward.masks import Masks, constrained

        round_, planning = self.plan()
        began = time.process_time()
        learning = self.learn(*self.last) if self.last else 0.0
        accepting = time.process_time() - began - learning  # by grammars, which come before masks in the loop
        drafts = [self.verified(round_, index) for index in range(self.size)]
        # Nothing reads a bonus token.
        rows = [(token, i) for i, each in enumerate(drafts) for token in (0, *each)]
        ids = torch.tensor(rows).T
        began = time.process_time() - accepting
        grammars = constrained(self.served, round_.most, 0)
        if grammars:
            masks = Masks(SimpleNamespace(ids_and_requests=ids), grammars)
            masks.build(self.served, self.planner.sources.spending)
        masking = time.process_time() - began if grammars else 0.0
        wanted = list(map(len, drafts))
        results = self.results(round_)._replace(wanted=wanted, widths=[1 + count for count in wanted])
        self.last = round_, results
        return HostRound(0.0, planning, learning, masking, self._drafting(round_))

    def _drafting(self, round_: Round) -> float:
        """Seconds of the drafters' passes."""
        return sum(self.tables.draft(arm, len(members)) for arm, members in round_.members.items())

    def _time(self, round_: Round, results: Results) -> RoundTime:
        """The round as the card takes it, whose forward is the recorded one."""
        rows, context = sum(results.widths), sum(self._lengths())
        drafted = {arm: len(members) for arm, members in round_.members.items()}
        seconds = self._drafting(round_) + self.tables.verifications.at(rows, context)
        tokens = sum(results.accept_lens)
        return RoundTime(rows, self.size, context, drafted, tokens=tokens, seconds=seconds)


def scheduler_seconds(sizes: Sequence[int]) -> dict[int, float]:
    """Requests → CPU seconds of a pass of SGLang's scheduler without its worker; outputs are not sent."""
    from engine import engine
    from tiny_models import tiny_target

    most, inside, found = max(sizes), list[float](), {}
    options = {"whiflash": {}, "max_running_requests": most, "max_total_tokens": 256 * most}
    with TemporaryDirectory() as root, engine(tiny_target(root), **options) as e:
        forward = e.worker.forward_batch_generation

        def apart(*args: Any, **named: Any) -> Any:
            began = time.process_time()
            result = forward(*args, **named)
            inside.append(time.process_time() - began)
            return result

        with patch.object(e.worker, "forward_batch_generation", apart):
            for size in sizes:
                for index in range(size):
                    e.submit(f"{size}-{index}-", [8 + index % 64] * 8, max_new_tokens=128)
                while len(e.scheduler.running_batch.reqs) < size:
                    e.step()
                spent = []
                for _ in range(PASSES):
                    began = time.process_time()
                    assert e.step()
                    spent.append(time.process_time() - began - inside.pop())
                found[size] = median(spent)
                e.run()
    return found


def figures(size: int, prices: dict[str, Any], scheduler: float) -> dict[str, float]:
    """Figures of so many agents; times in ms."""
    runs: list[list[HostRound]] = []
    for _ in range(RUNS):
        agents = OverlappedAgents(size, prices)
        runs.append([agents.step() for _ in range(SETTLED + ROUNDS)])
    own = [HostRound(*map(min, zip(*each, strict=True))) for each in zip(*runs, strict=True)]
    passes = [each._replace(scheduler=scheduler) for each in own]
    return {
        "agents": size,
        "under a grammar": sum(req.grammar is not None for req in agents.requests),
        "tokens a round": agents.tokens / agents.rounds / size,
        **{part: 1000 * mean(getattr(each, part) for each in passes[SETTLED:]) for part in HostRound._fields},
        "**shortest forward**": shortest(passes),
        "the same with a free scheduler": shortest(own),
        **{f"% of the time waited at {ms} ms": 100 * waits(passes, ms / 1000) for ms in FORWARDS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 8, 16, 32, 48, 256])
    parser.add_argument("--json", action="store_true", help="print the figures and write no page")
    given = parser.parse_args()
    prices = json.loads((RESULTS / "gpu/shaped.json").read_text())["figures"]["checks"]["auto"]["prices"]
    passes = scheduler_seconds(given.agents)
    gc.freeze()  # a server's heap is, too
    found = [figures(size, prices, passes[size]) for size in given.agents]
    made = made_by(("sglang", "torch", "xgrammar")) | busy()
    if given.json:
        print(json.dumps({"figures": found, **made}, indent=1))
        return
    rows = [[name, *(f"{each[name]:.2f}".removesuffix(".00") for each in found)] for name in found[0]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---:"] * len(rows[0]), *rows[1:]))
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    text = f"""# A host that never waits

The shortest forward (ms) at which a card waits for its host for less than {NEVER:.0%} of the time, by agents. The
host's parts are CPU ms a round, the card is a model ([how](../tests/host_pace.py)). Launches come on top: to plan and
issue a round of an 8B shape took an H200's host 2.7 ms at one request and 4.1 at 48 ([record](gpu/shaped.json)).

{table}

By `make host` on {made["hardware"]["cpu"]}, {made["hardware"]["cores"]} cores, load {made["load_1min"]:.1f}; Python \
{made["python"]}, {packages}; revision {made["revision"][:8]}{" and changes" * made["uncommitted_changes"]}.
"""
    print(table)
    (RESULTS / "host.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
