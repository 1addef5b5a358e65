"""What a round's results teach, in the one place that reads them: they may be known only when later rounds run."""

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from whiflash_kernels import Committed

from whiflash_sglang import arms
from whiflash_sglang.core import Proposal, Strand, agreement
from whiflash_sglang.device.ranks import Ranks
from whiflash_sglang.device.transfers import Download
from whiflash_sglang.drafters.base import Drafter, TextDrafter
from whiflash_sglang.lookup.copier import CONTEXT
from whiflash_sglang.lookup.copier import Proposal as Copy
from whiflash_sglang.round.plan import Plan
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.routing.assign import Costs
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.neural import note
from whiflash_sglang.routing.request_state import RequestState
from whiflash_sglang.telemetry.round_clock import PreviousRound, RoundClock
from whiflash_sglang.telemetry.tally import Tally
from whiflash_sglang.telemetry.trace import Part, Recording, behind, first_of

PLAIN_ENTROPY_ROUNDS = 8
"""Where nothing is drafted the entropy is read in every so many rounds: it costs as much as all else that is kept."""


@dataclass(frozen=True, slots=True)
class Learner:
    """Passes what rounds committed to the controller and the drafters; the first rank's, since only it decides by it.

    Arms with invalid drafts are reported to the quarantine in every rank. verifying: rows of each round that is not
    learned yet.
    """

    drafters: Mapping[str, Drafter]
    controller: Controller
    clock: RoundClock
    tally: Tally
    quarantine: Quarantine
    ranks: Ranks = field(default_factory=Ranks)
    verifying: deque[int] = field(default_factory=deque)

    def timed(self, previous: PreviousRound) -> None:
        """What an earlier round took."""
        costs, requests = self.controller.costs, previous.work.requests
        costs.observe(previous)
        plain_seconds = previous.tokens / requests * costs.verify(requests, requests)
        self.tally.timed(previous.seconds + previous.gap, plain_seconds)

    def needs(self, plan: Plan) -> Collection[str]:
        """Signals that the policy reads after a round."""
        needs = self.controller.policy.needs
        often = plan.speculates or self.clock.rounds % PLAIN_ENTROPY_ROUNDS == 0
        return needs if often else needs - {"entropy"}

    def learn(
        self,
        plan: Plan,
        found: Mapping[str, list[Any]],
        kept: Sequence[Sequence[int]] | None = None,
        *,
        parts: Sequence[Sequence[Part]] | None = None,
        strands: Sequence[tuple[Strand, int]] = (),
    ) -> list[list[int]]:
        """Learn from a round's results, as `Download.read` gives them. Returns the tokens that it committed.

        Args:
            parts: as of `Proposal`. strands: as of `Verified`.
            kept: what the scheduler kept of each request's tokens, where it has seen them already: nothing of one that
                had ended before the round, or that was retracted since. Its row may be another's by now.
        """
        if self.verifying:
            self.verifying.popleft()
        if kept is None:
            kept = [run[:count] for run, count in zip(found["tokens"], found["accept_lens"], strict=True)]
        tokens = [list(run) for run in kept]
        self.ranks.note(found["starts"], found["widths"], found["faults"], tokens)
        costs = self.controller.costs
        priced = costs.knows_plain and any(state.recording for state in plan.states)
        prices = round_prices(costs, plan.routes, sum(found["widths"])) if priced else None
        own_strands: dict[int, list[tuple[Strand, int]]] = defaultdict(list)
        for strand, right in strands:
            own_strands[strand.owner].append((strand, right))
        chosen_on_device = "wanted" in found
        for i, state in enumerate(plan.states):
            state.under_way.pop(0)
            chain = parts[i] if parts is not None else ()
            paths = _paths(() if chosen_on_device else chain, own_strands[i])
            arm, own = self._whose(plan, found, i, paths[0])
            if chosen_on_device and state.recording is not None:
                paths = _chosen_parts(plan, found, i, chain), ()
            if tokens[i] and self.ranks.leads:
                self._learn(plan, found, i, arm, own, tokens[i], prices, paths, own_strands[i])
        self.clock.learned(sum(map(len, tokens)))
        return tokens

    def _whose(
        self, plan: Plan, found: Mapping[str, list[Any]], i: int, path: Sequence[Part]
    ) -> tuple[str, int]:
        """The arm whose drafts a request verified first, and how many were its own; the quarantine hears of it."""
        rid, arm, voice, own = plan.states[i].rid, plan.routes[i], found["voice"][i], found["own"][i]
        if plan.limits[i]:
            self.quarantine.judge(arm, rid, faulty=bool(found["faults"][i]))
        if voice:
            arm, own = plan.speakers[max(voice - 1, -1)], found["widths"][i] - 1  # the device's is the last
        elif path:
            source = path[0].source
            arm = next((arm for arm, own in self.drafters.items() if source in own.sources), source)
        if arm != plan.routes[i]:
            self.quarantine.judge(arm, rid, faulty=False)
        return arm, own

    def _learn(
        self,
        plan: Plan,
        found: Mapping[str, list[Any]],
        i: int,
        arm: str,
        own: int,
        tokens: Sequence[int],
        prices: tuple[float, float] | None,
        paths: tuple[Sequence[Part], Sequence[Part]],
        strands: Sequence[tuple[Strand, int]],
    ) -> None:
        """What the i-th request's round teaches, in which `tokens` were committed.

        Args:
            arm, own: as of `_whose`. prices: `round_prices`, where they are wanted. paths: `_paths`. strands: its own.
        """
        state, decision, route, width = plan.states[i], plan.decisions[i], plan.routes[i], found["widths"][i]
        if "wanted" in found:
            self.controller.costs.wanted(plan.reckoned[i], found["wanted"][i])
        won = next((strand for strand, rows in strands if rows), None)
        right = len(tokens) - 1 if won is None else min(won.fork, len(tokens) - 1)
        beside = sum(len(strand.tokens) for strand, _ in strands)
        drafts = found["drafts"][i][: found["drafted"][i]]
        agreed = agreement(drafts, tokens)
        lengths = {arm: len(tokens)}
        if (won is not None or arm != route) and found["drafted"][i]:
            lengths[route] = agreed + 1  # what its drafts alone would have brought, or at least that
        evidence = self.controller.committed(state, decision, arm, tokens, width, found["starts"][i], lengths)
        self.tally.committed(
            state.counts,
            arm,
            decision.reason,
            tokens=len(tokens),
            proposed=width - 1,
            own=own,
            right=right,
            beside=beside,
        )
        if state.recording is not None:
            _record(state.recording, arm, len(tokens), prices, *paths)
        keeps = self.controller.keeps(state)  # a request's last round ends what drafters keep of it
        if evidence and route in self.drafters and keeps:
            known = min(len(drafts), len(tokens))
            with self.quarantine.guard(route, state.rid):
                self.drafters[route].observe(state.row, known, agreed, found["confidences"][i][:known])
        if "copies" in found and keeps:
            self._copied(plan.speakers[-1], state, found, i, tokens)
        if "entropy" in found:
            state.entropy = found["entropy"][i]
        if "outputs" in found:
            note(state, found["outputs"][i])

    def _copied(
        self, arm: str, state: RequestState, found: Mapping[str, list[Any]], i: int, tokens: Sequence[int]
    ) -> None:
        """The device copied for `arm`, whoever's drafts the round verified."""
        drafter, count = self.drafters[arm], found["copied"][i]
        assert isinstance(drafter, TextDrafter)
        copied, alive = found["copies"][i][:count], found["copy_alive"][i][:count]
        matched, agreements = found["copy_matched"][i], found["copy_agreements"][i]
        with self.quarantine.guard(arm, state.rid):
            drafter.copied(state.row, Copy(copied, alive, CONTEXT, matched, agreements), tokens)


def _chosen_parts(
    plan: Plan, found: Mapping[str, list[Any]], i: int, chain: Sequence[Part]
) -> Sequence[Part]:
    """The sources of the drafts that the device chose for a request. chain: those of the laid drafts, if known."""
    drafts, voice, own = found["widths"][i] - 1, found["voice"][i], found["own"][i]
    if voice > 0:
        said = plan.voices[i][plan.speakers[voice - 1]]
        chain = list(behind(said.parts, found["starts"][i] + 1 - said.at))
    elif voice < 0 or not chain:
        own = 0 if voice else own
        chain = [Part(plan.routes[i], own), Part(CONTEXT, drafts - own)]
    return [part for part in first_of(chain, drafts) if part.drafts]


def _paths(
    chain: Sequence[Part], strands: Sequence[tuple[Strand, int]]
) -> tuple[Sequence[Part], Sequence[Part]]:
    """What the accepted path of a request was taken from, and what was verified beside it."""
    if not strands:
        return chain, ()
    lost = [Part(strand.source, len(strand.tokens)) for strand, right in strands if not right]
    for strand, right in strands:
        if right:
            path = [*first_of(chain, strand.fork), Part(strand.source, len(strand.tokens))]
            return path, [*behind(chain, strand.fork), *lost]
    return chain, lost


def _record(
    recording: Recording,
    arm: str,
    tokens: int,
    prices: tuple[float, float] | None,
    parts: Sequence[Part],
    beside: Sequence[Part],
) -> None:
    """What a round of `arm` brought that committed `tokens`; prices: `round_prices`. parts, beside: `_paths`."""
    saved = recording.price(arm, tokens, round_seconds=prices[0], plain_seconds=prices[1]) if prices else 0.0
    proposed = sum(part.drafts for part in parts)
    recording.credit(parts, proposed=proposed, accepted=tokens - 1, saved=saved, beside=beside)


def round_prices(costs: Costs, routes: Sequence[str], rows: int) -> tuple[float, float]:
    """Seconds of a round of these routes that verifies `rows` rows, and of one of as many requests without drafts."""
    requests = len(routes)
    drafting = sum(costs.draft(arm, count) for arm, count in Counter(routes).items() if arm != arms.NONE)
    return drafting + costs.verify(rows, requests), costs.verify(requests, requests)


def results_of(
    proposal: Proposal, starts: torch.Tensor, committed: Committed, signals: Mapping[str, torch.Tensor]
) -> Download:
    """All that `Learner.learn` and the scheduler read of a round of B requests.

    `starts`, `widths`, `own` [B]; `drafts` [B, W] of the own arms, of which `drafted` [B] count, whether or not they
    were verified, and their `confidences` [B, C]; `bonus`, `seq_lens` [B] and `tokens` [B, W], of which `accept_lens`
    [B] count, as of `Committed`; `faults` [B], 1 where the own arm's drafts were none; `voice` [B], as of `Chosen`;
    `wanted` [B], drafts before the bound on rows was kept to, where there is one; `copies` [B, L] and what is known of
    them, as of `Copies`, where the device copies; `signals`, as of `Epilogue.signals`.
    """
    chosen, drafts = proposal.chosen, proposal.drafts
    assert drafts.confidences is not None
    assert drafts.faults is not None
    more = {"wanted": chosen.wanted} if proposal.bounded else {}
    if proposal.copies is not None:
        tokens, alive, widths, _, matched, agreements = proposal.copies
        more |= {"copies": tokens, "copied": widths, "copy_alive": alive}
        more |= {"copy_matched": matched, "copy_agreements": agreements}
    return Download(
        starts=starts,
        widths=proposal.rows_each,
        own=chosen.own,
        drafts=drafts.tokens,
        drafted=drafts.counts,
        voice=chosen.voice,
        bonus=committed.bonus,
        seq_lens=committed.seq_lens,
        tokens=committed.tokens,
        accept_lens=committed.accept_lens,
        confidences=drafts.confidences,
        faults=drafts.faults,
        **more,
        **signals,
    )
