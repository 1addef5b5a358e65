"""Draft sources: asks text drafters (lookup, structure) for candidates, which compiled code makes for a whole batch.

Imports no SGLang.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from whiflash_kernels.cpu.texts import NONE, Batch, Candidates

from whiflash_sglang.arms.base import Drafter, TextDrafter, of_text, widest_of
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import PLAIN, SOURCES, Candidate, Forecast
from whiflash_sglang.records.core import Round
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.structure.spending import Spending

COMPILED = arms.LOOKUP, arms.STRUCTURE
"""The arms for which compiled code drafts, in its order."""

Forecasts = dict[str, Forecast | None]
"""By arm that may draft for a request, its forecast of the round; None for an arm that forecasts nothing."""


class DraftSources:
    """Asks a worker's text drafters for candidates, and has them extend the drafts of others.

    Args:
        vocabulary: number of ids that the target has. spending: counts the seconds that requests spend on grammars.

    Attributes:
        of_text: all text drafters, by arm. on_device: those for which the device drafts too. proposing: those that
            make candidates, `on_device` first, as `choose_drafts` expects. proposers: arm by `Chosen.source`, from 1
            on; -1 is the arm for which the device copies. widest: most drafts of a round. width: most tokens of a
            candidate: two rounds of drafts, since the host may know texts a round late.
    """

    def __init__(
        self, drafters: Mapping[str, Drafter], quarantine: Quarantine, vocabulary: int, spending: Spending
    ) -> None:
        self._quarantine, self.vocabulary, self.spending = quarantine, vocabulary, spending
        self.of_text = of_text(drafters)
        self.on_device = {arm: drafter for arm, drafter in self.of_text.items() if drafter.on_device}
        proposing = {arm: drafter for arm, drafter in self.of_text.items() if drafter.proposes}
        self.proposing = dict(sorted(proposing.items(), key=lambda one: one[0] not in self.on_device))
        self.proposers = ("", *self.proposing, *self.on_device)
        self.widest = widest_of(drafters)
        self.width = 2 * self.widest + 1
        self._columns = {arm: column for column, arm in enumerate(self.proposing)}
        self._compiled = {arm: each for arm in COMPILED if (each := proposing.get(arm)) and each.library is not None}

    def propose(self, round_: Round, *, joins: bool) -> tuple[list[Forecasts], Batch | None]:
        """Fill the plan's candidates from its `asked` arms. Return each request's forecasts, and what `extend` needs of
        the requests for which compiled code drafts. joins: whether the device's copies may compete with other drafts.
        """
        round_.plan.candidates = None
        ahead = [round(len(request.under_way) * request.usual_rows) for request in round_.requests]
        forecasts = [self._forecasts(round_, index, each, joins=joins) for index, each in enumerate(ahead)]
        handles = [
            [self._handle(round_, i, arm, each) if each.get(arm) is PLAIN else 0 for i, each in enumerate(forecasts)]
            for arm in COMPILED
        ]
        if not any(map(any, handles)):
            return forecasts, None
        batch = self._batch(round_, handles, ahead)
        found = batch.propose(*self._written(round_, handles))
        self._judge(round_, batch)
        sizes = batch.candidates.sizes.tolist()
        for number, arm in enumerate(COMPILED):
            for index in (index for index, handle in enumerate(handles[number]) if handle):
                at = 4 * index + 2 * number
                forecasts[index][arm] = Forecast(found[at], int(found[at + 1]))
                if not sizes[index][self._columns[arm]]:
                    del forecasts[index][arm]
        return forecasts, batch

    def extend(self, round_: Round, batch: Batch | None) -> None:
        """Drop the candidates that may not be verified. Continue the others by other arms' drafts, such as a copy by
        forced text, and cut them before what a grammar forbids and after a token that ends the request. Drop those that
        are then only a copy of the request's own text, since the device makes such copies itself.
        """
        candidates = round_.plan.candidates
        if candidates is None or not candidates.sizes.any():
            round_.plan.candidates = None
            return
        modes = [
            [2 if request.may_join else int(request.may_verify(arm)) for arm in self.proposing]
            for request in round_.requests
        ]
        if batch is None:
            candidates.sizes[np.array(modes) == 0] = 0
        else:
            batch.extend(modes, [self.widest + sum(request.under_way) for request in round_.requests])
            self._judge(round_, batch)
        if not candidates.sizes.any():
            round_.plan.candidates = None

    def ask(self, round_: Round, index: int, drafter: TextDrafter, ahead: int = 0) -> Candidate | None:
        """Return a drafter's candidate, cut before its first invalid token or chance; None if it has none or raised.
        Faults go to the quarantine. ahead: `under_way` of `TextDrafter.propose`.
        """
        request, worth = round_.requests[index], round_.plan.worth
        with self._quarantine.guard(drafter.arm, request):
            found = drafter.propose(request, round_.most[index], partial(round_.history, index), worth, ahead)
            valid = found and found.valid(self.vocabulary)
            if found and valid and len(valid.tokens) < len(found.tokens):
                self._quarantine.judge(drafter.arm, request, faulty=True)
            return valid
        return None

    def _forecasts(self, round_: Round, index: int, ahead: int, *, joins: bool) -> Forecasts:
        """Return a request's forecasts; `PLAIN` for arms for which compiled code has to look first."""
        request = round_.requests[index]
        expected: Forecasts = {}
        for arm in round_.plan.asked[index]:
            drafter = self.of_text.get(arm)
            if arm in self._quarantine.reasons:
                continue  # quarantined when it was asked for an earlier request of this batch
            if drafter is None:
                expected[arm] = None
            elif joins and (promised := drafter.promised(request)) is not None:
                # Otherwise nobody but the host copies, so its index stays.
                if promised.length > 1:
                    expected[arm] = promised
            elif arm in self._compiled:
                expected[arm] = PLAIN
            elif (candidate := self.ask(round_, index, drafter, ahead if drafter.proposes else 0)) and candidate.tokens:
                column = self._columns[arm]
                self._candidates(round_).enter(index, column, len(SOURCES) + column, candidate)
                price = round_.plan.worth.least_chance if ahead else 0.0  # else `propose` cut it by price
                expected[arm] = candidate.outlook(drafter.max_drafts, ahead, price)
            elif not drafter.proposes and self._quarantine.serves(arm, request):
                expected[arm] = None
        return expected

    def _handle(self, round_: Round, index: int, arm: str, expected: Forecasts) -> int:
        """Return the address of a request's object in compiled code; 0, and no `PLAIN` forecast, if `arm` has none."""
        try:  # not `guard`, which takes a microsecond for each request and arm
            if handle := self._compiled[arm].handle(round_.requests[index], partial(round_.history, index)):
                return handle
        except Exception as error:
            self._quarantine.raised(arm, error, round_.requests[index])
        del expected[arm]
        return 0

    def _batch(self, round_: Round, handles: Sequence[Sequence[int]], ahead: Sequence[int]) -> Batch:
        (library, *_) = (drafter.library for drafter in self._compiled.values())
        widest = [self._compiled[arm].max_drafts if arm in self._compiled else 0 for arm in COMPILED]
        columns = [self._columns.get(arm, NONE) for arm in COMPILED]
        late = (index for index, request in enumerate(round_.requests) if request.rid == self.spending.late)
        assert library is not None
        least = round_.plan.worth.least_chance
        return Batch(library, self._candidates(round_), handles, ahead, columns, widest, least, next(late, 0))

    def _candidates(self, round_: Round) -> Candidates:
        """Return the plan's candidates, which are made when the first one is found or looked for."""
        if round_.plan.candidates is None:
            round_.plan.candidates = Candidates.of(len(round_), len(self.proposing), self.width)
        return round_.plan.candidates

    def _written(self, round_: Round, handles: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens that compiled code does not have yet, request after request; where each request's tokens
        end among these; and the position of each request's first one.
        """
        tokens: list[int] = []
        ends: list[int] = []
        starts: list[int] = []
        for index, (request, *at) in enumerate(zip(round_.requests, *handles, strict=True)):
            starts.append(request.known or request.prompt)
            if any(at):
                tokens += round_.history(index, starts[-1])
            ends.append(len(tokens))
            request.known = starts[-1] + ends[-1] - (ends[-2] if index else 0)
        return tokens, ends, starts

    def _judge(self, round_: Round, batch: Batch) -> None:
        """Pass to the quarantine the errors that arms raised when compiled code asked them, and drop their drafts."""
        for arm, drafter in self._compiled.items():
            while drafter.raised:
                request, error = drafter.raised.pop()
                batch.drop(round_.requests.index(request), self._columns[arm])
                self._quarantine.raised(arm, error, request)
