"""A third arm behind the drafter interface, for tests: it knows the answers and is wrong as often as it is told.

Random drafters are seldom right; this one makes long accepted runs, full blocks and ragged widths common, and
shows that an arm fits in without a change to the worker.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch
from whiflash_kernels import Drafts

from whiflash_sglang.arms.base import TextDrafter
from whiflash_sglang.drafts.candidates import Candidate
from whiflash_sglang.prices.costs import Worth
from whiflash_sglang.records.core import DraftBatch, History
from whiflash_sglang.records.request import Request

if TYPE_CHECKING:
    from traffic import Arrival

ARM = "oracle"


class OracleArm(TextDrafter):
    """Proposes the known continuation of a request, each token corrupted with probability 1 - `accuracy`.

    Args:
        ragged: half of its drafts are shorter than they may be.
        alphabet: what corrupted drafts, and drafts for unknown texts, are drawn from.
    """

    arm = ARM
    proposes = False

    def __init__(
        self,
        accuracy: float,
        *,
        seed: int = 0,
        max_drafts: int = 7,
        ragged: bool = True,
        alphabet: Sequence[int] = range(256),
    ) -> None:
        self.max_drafts, self._ragged = max_drafts, ragged
        self._accuracy, self._alphabet = accuracy, list(alphabet)
        self._random = random.Random(seed)
        self._texts: list[list[int]] = []
        self._ahead: dict[int, list[int]] = {}
        self.accepted: list[int] = []
        self.rejected = 0

    def learn(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        """`output` may follow `prompt`; where several texts do, one of them is drafted."""
        self._texts.append([*prompt, *output])

    def knowing(self, arrivals: Iterable["Arrival"], texts: Mapping[str, Sequence[int]]) -> Self:
        """This arm, when it has learned the texts of these requests."""
        for a in arrivals:
            self.learn(a.prompt, texts[a.rid])
        return self

    def unlearn(self) -> None:
        """Everything but the seed."""
        self._texts.clear()
        self.accepted.clear()
        self.rejected = 0

    def propose(
        self, request: Request, length: int, history: History, worth: Worth, under_way: int = 0
    ) -> Candidate | None:
        known = list(history(0))
        texts = [text for text in self._texts if text[: len(known)] == known]
        self._ahead[request.row] = self._random.choice(texts)[len(known) :] if texts else []
        return None

    def draft(self, batch: DraftBatch) -> Drafts:
        counts = list(batch.limits)
        if self._ragged:
            counts = [self._random.choice([limit, self._random.randint(1, limit)]) for limit in batch.limits]
        tokens = torch.full((len(batch), max(counts)), -1, dtype=torch.int64)
        for i, (row, count) in enumerate(zip(batch.row_ids, counts, strict=True)):
            ahead = self._ahead[row][:count]
            ahead += self._random.choices(self._alphabet, k=count - len(ahead))
            wrong = self._random.choices(self._alphabet, k=count)
            tokens[i, :count] = torch.tensor(
                [a if self._random.random() < self._accuracy else w for a, w in zip(ahead, wrong, strict=True)]
            )
        # Tokens beyond a request's count are padding and must not be read.
        alive = torch.tensor(self._accuracy).pow(torch.arange(1, max(counts) + 1)).expand(tokens.shape)
        return Drafts(tokens, torch.tensor(counts), alive)

    def observe(self, row: int, proposed: int, accepted: int, confidences: Sequence[float]) -> None:
        self.accepted.append(accepted)
        self.rejected += proposed - accepted

    def end(self, request: Request) -> None:
        self._ahead.pop(request.row, None)
