"""Learns from a round's results on the host. They may arrive while later rounds run, so only this module reads them."""

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from whiflash_kernels import Committed

from whiflash_sglang.arms.base import Drafter, TextDrafter
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.drafts import arms
from whiflash_sglang.drafts.candidates import CONTEXT, Candidate, Part, common_prefix, parts_of
from whiflash_sglang.prices.costs import Costs
from whiflash_sglang.prices.round_clock import RoundClock, RoundTime
from whiflash_sglang.records.core import Results, Round
from whiflash_sglang.records.request import Request
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.neural import note
from whiflash_sglang.telemetry.tally import Tally

PLAIN_ENTROPY_ROUNDS = 8
"""Rounds between two readings of the entropy if nothing is drafted: it costs as much as a round's other bookkeeping."""


@dataclass(frozen=True, slots=True)
class Learner:
    """Passes a round's results to the controller and the drafters, on the first rank, which decides for all.

    On every rank it reports arms with invalid drafts to the quarantine. proposers: arm by `Chosen.source`
    (`DraftSources`). verifying: number of verified rows of each round without results yet.
    """

    drafters: Mapping[str, Drafter]
    controller: Controller
    clock: RoundClock
    tally: Tally
    quarantine: Quarantine
    proposers: Sequence[str]
    ranks: Ranks = field(default_factory=Ranks)
    verifying: deque[int] = field(default_factory=deque)

    def timed(self, previous: RoundTime) -> None:
        """Learn prices from the seconds that an earlier round took."""
        costs, requests, seconds = self.controller.costs, previous.requests, previous.seconds + previous.gap
        costs.observe(previous)
        self.tally.timed(previous.tokens, seconds)
        if (plain := costs.plain(requests)) is not None:
            self.tally.priced(previous.tokens, seconds, plain_seconds=previous.tokens / requests * plain)

    def needs(self, round_: Round) -> Collection[str]:
        """Return the names of the signals that the policy reads after this round."""
        needs = self.controller.policy.needs
        often = round_.plan.speculates or self.clock.rounds % PLAIN_ENTROPY_ROUNDS == 0
        return needs if often else needs - {"entropy"}

    def learn(self, round_: Round, results: Results, kept: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
        """Learn from a round's results. Return the tokens that each request committed.

        Args:
            kept: the tokens of each request that the scheduler has kept, if it has processed them. Empty for a request
                that ended before the round or was retracted since; its row may belong to another request by now.
        """
        if self.verifying:
            self.verifying.popleft()
        if kept is None:
            kept = [run[:count] for run, count in zip(results.tokens, results.accept_lens, strict=True)]
        tokens = [list(run) for run in kept]
        self.ranks.note(results.starts, results.widths, results.faults, tokens)
        recorded = any(request.recording for request in round_.requests)
        rows = sum(results.widths)
        prices = round_prices(self.controller.costs, round_.plan.routes, rows) if recorded else None
        for i, request in enumerate(round_.requests):
            request.under_way.pop(0)
            parts = () if request.recording is None else self._chosen_parts(round_, results, i)
            arm, drafted = self._first_arm(round_, results, i)
            if tokens[i] and self.ranks.leads:
                self._learn(round_, results, i, arm, drafted, tokens[i], prices, parts)
        self.clock.learned(round_.time, sum(map(len, tokens)))
        return tokens

    def _first_arm(self, round_: Round, results: Results, i: int) -> tuple[str, int]:
        """Return the arm of a request's first verified drafts and how many are its own; the quarantine judges it."""
        request, arm = round_.requests[i], round_.plan.routes[i]
        source, drafted = results.source[i], results.first_drafts[i]
        if round_.plan.limits.passes[i]:
            if results.drafted[i] or results.faults[i]:
                self.quarantine.judge(arm, request, faulty=bool(results.faults[i]))
            elif not source:
                return arms.NONE, 0  # the pass raised, so the round shows nothing of the arm
        if source:
            arm, drafted = self.proposers[source], results.widths[i] - 1
        if arm != round_.plan.routes[i]:
            self.quarantine.judge(arm, request, faulty=False)
        return arm, drafted

    def _learn(
        self,
        round_: Round,
        results: Results,
        i: int,
        arm: str,
        first_drafts: int,
        tokens: Sequence[int],
        prices: tuple[float, float] | None,
        parts: Sequence[Part],
    ) -> None:
        """Learn from the i-th request's round, in which `tokens` were committed.

        Args:
            arm, first_drafts: the arm of the first verified drafts, and how many are its own (`_first_arm`). prices:
                `round_prices`, None if no request is recorded. parts: the sources of the verified drafts.
        """
        request, decision, route = round_.requests[i], round_.decisions[i], round_.plan.routes[i]
        width = results.widths[i]
        if results.wanted is not None:
            self.controller.wanted(request, decision, round_.plan.priced_as[i], results.wanted[i])
        drafts = results.drafts[i][: results.drafted[i]]
        agreed = common_prefix(drafts, tokens)
        lengths = {arm: len(tokens)}
        if arm != route and results.drafted[i]:
            lengths[route] = agreed + 1  # at least the length that the route's own drafts would have had
        right = agreed if arm == route else 0
        if len(tokens) < results.accept_lens[i]:  # the scheduler kept accepted drafts only
            right = len(tokens)
        request.begin(partial(round_.answer, i))  # the host knew no token yet when the round was planned
        evidence = self.controller.committed(request, decision, arm, tokens, width, results.starts[i], lengths, right)
        self.tally.committed(
            request.counts, arm, decision.reason, tokens=len(tokens), proposed=width - 1, first=first_drafts
        )
        if (recording := request.recording) is not None:
            saved, verified = 0.0, sum(part.drafts for part in parts)
            if prices:
                saved = recording.price(arm, len(tokens), round_seconds=prices[0], plain_seconds=prices[1])
            recording.credit(parts, proposed=verified, accepted=len(tokens) - 1, saved=saved)
        # Drafters drop a request's data when it ends, so its last round teaches them nothing.
        if evidence and route in self.drafters and request.running:
            known = min(len(drafts), len(tokens))
            try:
                self.drafters[route].observe(request.row, known, agreed, results.confidences[i][:known])
            except Exception as error:
                self.quarantine.raised(route, error, request)
        if results.copies is not None and request.running:
            self._copied(self.proposers[-1], request, results, i, tokens)
        if results.entropy is not None:
            request.entropy = results.entropy[i]
        if results.outputs is not None:
            note(request, results.outputs[i])

    def _copied(self, arm: str, request: Request, results: Results, i: int, tokens: Sequence[int]) -> None:
        """Show `arm` the device's copy for a request and the committed tokens, whether or not the copy was verified."""

        def copy() -> Candidate:
            count, matched, agreements = results.copied[i], results.copy_matched[i], results.copy_agreements[i]
            copied, alive = results.copies[i][:count], results.copy_alive[i][:count]
            return Candidate(copied, alive, (), 0, matched, agreements)

        drafter = self.drafters[arm]
        assert isinstance(drafter, TextDrafter)
        try:
            drafter.copied(request, copy, tokens)
        except Exception as error:
            self.quarantine.raised(arm, error, request)

    def _chosen_parts(self, round_: Round, results: Results, i: int) -> Sequence[Part]:
        """Return the sources of the drafts that the device chose for a request."""
        drafts, source = results.widths[i] - 1, results.source[i]
        if source > 0:
            candidates, place = round_.plan.candidates, (i, source - 1)
            assert candidates is not None
            begin = max(results.starts[i] + 1 - int(candidates.at[place]), 0)
            return parts_of(candidates.names[place][begin : begin + drafts].tolist(), self.proposers[1:])
        first_drafts = 0 if source else results.first_drafts[i]
        parts = [Part(round_.plan.routes[i], first_drafts), Part(CONTEXT, drafts - first_drafts)]
        return [part for part in parts if part.drafts]


def round_prices(costs: Costs, routes: Sequence[str], rows: int) -> tuple[float, float] | None:
    """Return the seconds of a round with these routes that verifies `rows` rows, and those of a round of the same
    requests without drafts; None while the latter price is unknown.
    """
    if (plain := costs.plain(len(routes))) is None:
        return None
    drafting = sum(costs.draft(arm, count) for arm, count in Counter(routes).items() if arm != arms.NONE)
    return costs.lasts(drafting + costs.verify(rows, len(routes))), plain


def results_of(round_: Round, committed: Committed, signals: Mapping[str, torch.Tensor]) -> Results:
    """Return the results of a round as tensors on the device. signals: from `SignalReader.read`."""
    chosen, drafts = round_.chosen, round_.drafts
    assert drafts.confidences is not None
    assert drafts.faults is not None
    copied: dict[str, torch.Tensor | None] = {}
    if (copies := round_.copies) is not None:
        copied = {"copies": copies.tokens, "copied": copies.counts, "copy_alive": copies.alive}
        copied |= {"copy_matched": copies.matched, "copy_agreements": copies.agreements}
    return Results(
        starts=round_.starts,
        widths=chosen.widths,
        first_drafts=chosen.first_drafts,
        drafts=drafts.tokens,
        drafted=drafts.counts,
        source=chosen.source,
        bonus=committed.bonus,
        seq_lens=committed.seq_lens,
        tokens=committed.tokens,
        accept_lens=committed.accept_lens,
        confidences=drafts.confidences,
        faults=drafts.faults,
        wanted=chosen.wanted if any(round_.plan.limits.drafts) else None,
        **copied,
        **signals,
    )
