"""CPU time of planning and learning a round, by requests: `python tests/planning_time.py`.

The planner, the learner, the policy `auto` and the copying arm of a server where the host does not wait for the device,
over two drafters that draft nothing: no model runs, and SGLang is not imported. Every request copies from a text of its
own, which grows by two tokens a round; what the device would copy is known. Printed is the least of many rounds, in
milliseconds of one process.
"""

import argparse
import random
import time
from types import SimpleNamespace
from typing import Any

import torch

from whiflash_sglang import arms
from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.core import Round
from whiflash_sglang.device.transfers import HostView
from whiflash_sglang.drafters.base import Drafter, KVDrafter, of_text
from whiflash_sglang.drafters.length import DraftLength
from whiflash_sglang.drafters.lookup import LookupArm
from whiflash_sglang.lookup.calibration import Agreement
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.learning import Learner
from whiflash_sglang.round.planning import Planner, rows_of
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_sglang.routing.tables import CostTables, LookedUpCosts, Sizes, Verifications
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.structure.spending import Spending
from whiflash_sglang.telemetry.round_clock import RoundClock, RoundTime
from whiflash_sglang.telemetry.tally import Tally

VOCABULARY, PROMPT, CONTEXT, NEW, COPIED = 1000, 64, 8192, 2, 24
ROWS = tuple(range(1, 4097, 8))


class Silent(KVDrafter):
    """A drafter that has only its name and width."""

    def __init__(self, arm: str, most: int) -> None:
        self.arm, self.max_drafts = arm, most
        self.length = DraftLength()

    def calibration(self, row_ids: Any) -> list[float]:
        return self.length.calibration()

    def observe(self, row: int, proposed: int, accepted: int, confidences: Any) -> None:
        self.length.observe(proposed=proposed, accepted=accepted, confidences=confidences)


class Batch:
    """So many requests that never end."""

    def __init__(self, size: int, seed: int = 0) -> None:
        host, self.random, self.size = HostView(exact=False, late=True), random.Random(seed), size
        self.drafters: dict[str, Drafter] = {
            arms.AR: Silent(arms.AR, 5),
            arms.DIFFUSION: Silent(arms.DIFFUSION, 15),
            arms.LOOKUP: LookupArm(Lookup(), host, time.monotonic),
        }
        held = Quarantine(self.drafters, from_text=of_text(self.drafters))
        sync = DraftSync(self.drafters, 256, 1, torch.float32, held)
        sync.allocate(torch.zeros((size + 1, 1), dtype=torch.int32))
        costs = LookedUpCosts(lambda arm: rows_of(self.drafters, arm))
        seconds = Sizes(ROWS, tuple(0.007 + 0.00002 * rows for rows in ROWS))
        drafts = {arm: Sizes((1, 4096), (0.001, 0.002)) for arm in (arms.AR, arms.DIFFUSION)}
        costs.tables = CostTables(Verifications(0, 1, seconds, seconds), drafts, {})
        controller, clock = Controller(AutoPolicy(), costs, ()), RoundClock()
        sources = DraftSources(self.drafters, held, VOCABULARY, Spending())
        self.planner = Planner(self.drafters, sync, controller, clock, held, sources, host)
        self.learner = Learner(
            self.drafters, controller, clock, Tally.of(self.drafters), held, sources.proposers
        )
        self.requests = []
        for row in range(1, size + 1):
            text = self.random.choices(range(VOCABULARY), k=PROMPT) * 2
            self.requests.append(SimpleNamespace(rid=str(row), origin_input_ids=text, output_ids=[text[0]]))
            held.begin(str(row), None)
            controller.open(row, str(row), RequestHints(), ())
            for drafter in of_text(self.drafters).values():
                drafter.begin(row, RequestHints(), None, prompt=len(text))

    def round(self) -> float:
        """CPU seconds of planning a round and of learning from it."""
        lengths = [len(req.origin_input_ids) + len(req.output_ids) - 1 for req in self.requests]
        starts = torch.tensor(lengths)
        round = Round(
            rows=torch.arange(1, self.size + 1),
            row_ids=list(range(1, self.size + 1)),
            starts=starts,
            least=lengths,
            most=lengths,
            bonus=torch.zeros_like(starts),
            reqs=self.requests,
            budgets=[CONTEXT] * self.size,
            ahead=[[]] * self.size,
        )
        began = time.process_time()
        self.planner.plan(round)
        spent = time.process_time() - began
        round.bounded = True
        results = self._results(lengths)
        began = time.process_time()
        tokens = self.learner.learn(round, results)
        self.learner.timed(RoundTime(4 * self.size, self.size, tokens=NEW * self.size, seconds=0.01))
        spent += time.process_time() - began
        for req, new in zip(self.requests, tokens, strict=True):
            req.output_ids += new
        return spent

    def _results(self, lengths: list[int]) -> dict[str, list[Any]]:
        """The results of such a round: three drafts each, one of them right."""
        many, texts = self.size, [req.origin_input_ids for req in self.requests]
        numbers = [len(req.output_ids) for req in self.requests]
        copies = [
            [text[(at + i) % PROMPT] for i in range(COPIED)] for text, at in zip(texts, numbers, strict=True)
        ]
        new = [copy[:NEW] for copy in copies]
        return {
            "starts": lengths,
            "widths": [4] * many,
            "first_drafts": [3] * many,
            "drafts": [[run[0], 0, 0] for run in new],
            "drafted": [3] * many,
            "source": [0] * many,
            "tokens": new,
            "accept_lens": [NEW] * many,
            "confidences": [[0.7, 0.5, 0.4]] * many,
            "faults": [0] * many,
            "wanted": [3] * many,
            "entropy": [0.4] * many,
            "copies": copies,
            "copied": [COPIED] * many,
            "copy_alive": [[0.9**depth for depth in range(1, COPIED + 1)]] * many,
            "copy_matched": [32] * many,
            "copy_agreements": [[Agreement.UNANIMOUS] * COPIED] * many,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 48, 128])
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args()
    for size in given.requests:
        batch = Batch(size)
        least = min(batch.round() for _ in range(given.rounds))
        print(f"{size:4d} requests: {1000 * least:.2f} ms to plan and learn a round", flush=True)


if __name__ == "__main__":
    main()
