"""The stage `verify`: one forward of the target over bonus tokens and drafts, and the target's token at every row."""

from collections.abc import Sequence
from typing import Any

from whiflash_kernels import MixedBlock, prepare_mixed_block

from whiflash_sglang.cache.tokens import NO_TOKEN
from whiflash_sglang.device.transfers import HostView, sent
from whiflash_sglang.engine.forward import sampling
from whiflash_sglang.engine.forward.masks import Masks, constrained
from whiflash_sglang.engine.forward.parallel import first_ranks, sends_tokens
from whiflash_sglang.engine.forward.target import Target
from whiflash_sglang.records.core import Round, SampleHook, Verified
from whiflash_sglang.round.epilogue import Epilogue
from whiflash_sglang.structure.spending import Spending


class VerifyStage:
    """Runs the target over a round's drafts and samples its own token at every row.

    Args:
        epilogue: the functions with which graphs of the target end, where they may.
        hooks: replace sampled tokens, one after the other. spending: time spent on grammars.
    """

    def __init__(
        self,
        target: Target,
        host: HostView,
        epilogue: Epilogue,
        hooks: Sequence[SampleHook],
        spending: Spending,
    ) -> None:
        self._spending, self._checks = spending, sampling.checks_numbers()
        self._target, self._host = target, host
        self._epilogue, self._hooks = epilogue, hooks

    def verify(self, batch: Any, turn: Round, barrier: Any) -> Verified:
        """Run the target over bonus tokens and drafts.

        Args:
            barrier: SGLang's function that gives grammars the tokens of the last round, whose results the scheduler has
                not processed yet; called before masks are made. None: the grammars have them.
        """
        chosen = turn.chosen
        rows = self._target.agreed_rows(turn.packed_rows, len(turn), chosen.widths if turn.bounded else None)
        turn.packed_rows = min(turn.packed_rows, rows)
        requests = turn.bonus, chosen.tokens, chosen.widths, turn.starts, turn.rows
        padded = prepare_mixed_block(*requests, self._target.slot_table, rows=rows)
        host_widths = chosen.widths.tolist() if self._host.exact else None
        block = padded if host_widths is None else packed(padded, sum(host_widths))
        grammars, info = constrained(batch, turn.most, turn.stride), batch.sampling_info
        masks = Masks(block, turn.ahead, grammars) if grammars else None
        sends, seeded = sends_tokens(bool(grammars)), sampling.is_seeded(batch)
        asked = sampling.asked_rates(batch)
        rated = self._epilogue.rated(asked) if asked else None
        penalised = self._epilogue.penalties.any(turn.row_ids)
        eager = seeded or info.has_custom_logit_processor  # both need masked logits outside the graph
        in_graph = not (eager or sends or self._checks)
        unchanged = masks is None and not (penalised or (rated is not None and rated.captured))
        self._epilogue.let_graphs_commit(in_graph and unchanged, turn.row_ids)
        verified = self._target.verify(batch, padded, chosen.widths, host_widths, turn.stride)
        verified = verified._replace(starts=turn.starts, request_rows=turn.rows, rated=rated)
        if masks is not None:
            if barrier is not None:
                barrier()
            masks.build(batch, self._spending)
        if self._checks:
            sampling.check_numbers(verified.logits)
        if in_graph:
            packed_masks = None if masks is None else masks.packed
            verified = self._epilogue.finish(verified, len(turn), packed_masks, penalised)
        row_masks = None if eager else masks  # None: there are no masks, or the logits are masked already
        if verified.committed is None:
            if penalised or eager:
                verified = self._epilogue.penalise(verified)
            if eager and masks is not None:
                masks.apply(verified.logits)
            sampling.process(info, verified.logits, block)
            if seeded:
                predictions = sampling.sample_as_sglang(self._target.runner, info, verified.logits, block)
            else:
                predictions = self._epilogue.sample(
                    verified, None if row_masks is None else row_masks.of_rows
                )
            predictions = first_ranks(predictions) if sends else predictions
            verified = verified._replace(predictions=predictions)
        if masks is not None and masks.rejected and verified.committed is None:
            # A grammar refuses these drafts, so they are rejected whatever the target predicts.
            rejected = sent(masks.rejected, block.input_ids.device)
            block = block._replace(input_ids=block.input_ids.index_fill(0, rejected, NO_TOKEN))
            verified = verified._replace(input_ids=block.input_ids)
        if row_masks is not None and rated is not None and "rates" not in verified.signals:
            verified = verified._replace(rated=rated._replace(masks=row_masks.of_rows))
        for hook in self._hooks:
            verified = hook.verified(verified, block)
        return verified


def packed(block: MixedBlock, rows: int) -> MixedBlock:
    """Return `block` cut to its first `rows` rows, without the padding after them."""
    return block._replace(
        input_ids=block.input_ids[:rows],
        positions=block.positions[:rows],
        cache_slots=block.cache_slots[:rows],
        request_of_row=block.request_of_row[:rows],
        ids_and_requests=block.ids_and_requests[:, :rows],
    )
