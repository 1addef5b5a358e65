"""The stage `verify`: one forward of the target over bonus tokens and drafts, and the target's token at every row."""

from enum import Enum
from typing import Any, NamedTuple

from whiflash_kernels import MixedBlock, prepare_mixed_block

from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.engine.forward.masks import Masks, constrained
from whiflash_sglang.engine.forward.parallel import first_ranks, sends_tokens
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.records.core import Rated, Round, Verified
from whiflash_sglang.round.ends import GraphEnds, Kind
from whiflash_sglang.round.epilogue import Epilogue, under_masks
from whiflash_sglang.round.forcing import Forcing
from whiflash_sglang.structure.spending import Spending

Place = Enum("Place", ["GRAPH", "SECOND_GRAPH", "BEHIND"])
"""Places where rows are committed: at the end of their graph, in a second graph, or eagerly after their forward."""


class CommitPlan(NamedTuple):
    """Decisions about a round's rows: how they are sampled, and where they are committed if a graph is replayed.

    masks: of grammars that may forbid a token; None if none may. penalised: whether penalties or biases change logits.
    rated: requests that want log-probabilities; None if none do. seeded: whether SGLang's sampler draws. reads_logits:
    whether it or a client's processor reads logits, which must be masked and penalised by then. shared: whether all
    ranks take the first rank's tokens.
    """

    place: Place
    masks: Masks | None
    penalised: bool
    rated: Rated | None
    seeded: bool
    reads_logits: bool
    shared: bool

    @property
    def kind(self) -> Kind:
        """Return the kind of second graph that commits these rows."""
        rates = self.rated is not None and self.rated.captured
        return self.masks is not None, self.penalised or rates, rates


class VerifyStage:
    """Runs the target over a round's drafts and samples its own token at every row.

    Args:
        ends: commits rows in graphs. forcing: replaces sampled tokens; None where no text is forced.
        spending: time spent on grammars.
    """

    def __init__(
        self, target: Target, epilogue: Epilogue, ends: GraphEnds, forcing: Forcing | None, spending: Spending
    ) -> None:
        self._target, self._epilogue, self._ends = target, epilogue, ends
        self._forcing, self._spending, self._checks = forcing, spending, sampling.checks_numbers()

    def verify(self, batch: Any, round_: Round, barrier: Any) -> Verified:
        """Run the target over bonus tokens and drafts, and commit them if a graph may.

        Args:
            barrier: SGLang's function that gives grammars the tokens of the last round, whose results the scheduler has
                not processed yet; called before masks are made. None: the grammars have them.
        """
        widths, requests = round_.chosen.widths, len(round_)
        rows = self._target.agreed_rows(round_.packed_rows, requests, widths if round_.stride > 1 else None)
        round_.packed_rows = min(round_.packed_rows, rows)
        packed = round_.bonus, round_.chosen.tokens, widths, round_.starts, round_.rows
        block = prepare_mixed_block(*packed, self._target.slot_table, rows=rows)
        plan = self._plan(batch, round_, block)
        self._ends.let_commit(plan.place is Place.GRAPH)
        verified = self._target.verify(batch, block, widths, round_.stride)
        verified = verified._replace(starts=round_.starts, request_rows=round_.rows, rated=plan.rated)
        if plan.masks is not None:
            if barrier is not None:
                barrier()
            plan.masks.build(batch, self._spending)
        if plan.place is Place.BEHIND or not self._ends.has(verified.graph, plan.kind):
            return self._behind_graph(batch, verified, block, plan)
        if plan.place is Place.GRAPH:
            return self._ends.in_graph(verified, requests)
        masks = None if plan.masks is None else plan.masks.packed
        return self._ends.in_second_graph(verified, requests, plan.kind, masks)

    def _plan(self, batch: Any, round_: Round, block: MixedBlock) -> CommitPlan:
        grammars, asked = constrained(batch, round_.most, round_.stride), sampling.asked_rates(batch)
        seeded = sampling.is_seeded(batch)
        plan = CommitPlan(
            place=Place.BEHIND,
            masks=Masks(block, grammars) if grammars else None,
            penalised=self._epilogue.penalties.any(round_.row_ids),
            rated=self._ends.rated(asked) if asked else None,
            seeded=seeded,
            reads_logits=seeded or batch.sampling_info.has_custom_logit_processor,
            shared=sends_tokens(bool(grammars)),
        )
        beyond_graphs = self._epilogue.penalties.exceed_few(round_.row_ids)
        if plan.reads_logits or plan.shared or self._checks or beyond_graphs:
            return plan
        return plan._replace(place=Place.SECOND_GRAPH if any(plan.kind) else Place.GRAPH)

    def _behind_graph(self, batch: Any, rows: Verified, block: MixedBlock, plan: CommitPlan) -> Verified:
        """Sample rows eagerly after the graph; the stages commit and park then run eagerly too."""
        info = batch.sampling_info
        if self._checks:
            sampling.check_numbers(rows.logits)
        if plan.masks is not None:
            rows = under_masks(rows, *plan.masks.sent())
        if plan.penalised or plan.reads_logits:
            rows = self._epilogue.penalise(rows)
        if plan.masks is not None and plan.reads_logits:
            rows = plan.masks.apply(rows)
        sampling.process(info, rows.logits, block)
        if plan.seeded:
            predictions = sampling.sample_as_sglang(self._target.runner, info, rows.logits, block)
        else:
            predictions = self._epilogue.sample(rows)
        rows = rows._replace(predictions=first_ranks(predictions) if plan.shared else predictions)
        return rows if self._forcing is None else self._forcing.verified(rows, block)
