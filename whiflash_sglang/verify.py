"""The verify stage of a round: one forward of the target over bonus tokens and drafts, and its token at every row."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from whiflash_kernels import MixedBlock, prepare_mixed_block

from whiflash_sglang.cache.tokens import NO_TOKEN, TokenTable
from whiflash_sglang.compat.forward import sampling
from whiflash_sglang.compat.forward.masks import Masks, grammar_trees
from whiflash_sglang.compat.forward.target import Target
from whiflash_sglang.core import Round, SampleHook, Verified
from whiflash_sglang.device.transfers import HostView
from whiflash_sglang.round.epilogue import Epilogue
from whiflash_sglang.round.strands import accepted_rows, fold, moves, pack
from whiflash_sglang.structure.spending import Spending


class VerifyStage:
    """The target judges drafts.

    Args:
        tokens: committed text, for penalties. epilogue: what graphs of the target's end with, where they may.
        hooks: replace what was sampled, one after the other. spending: on grammars.
    """

    def __init__(
        self,
        target: Target,
        tokens: TokenTable,
        host: HostView,
        epilogue: Epilogue,
        hooks: Sequence[SampleHook],
        spending: Spending,
    ) -> None:
        self._spending = spending
        self._target, self._tokens, self._host = target, tokens, host
        self._epilogue, self._hooks = epilogue, hooks

    def verify(self, batch: Any, round: Round, barrier: Any) -> Verified:
        """Run the target over bonus tokens and drafts.

        Args:
            barrier: of SGLang: what a grammar needs before its masks are made.
        """
        strands, table, chosen = round.strands, self._target.slot_table, round.chosen
        requests, owners = (round.bonus, chosen.tokens, chosen.widths, round.starts, round.rows), None
        if strands:
            requests, owners = pack(requests, round.most, strands, round.spare, table)
        *_, widths, starts, rows = requests
        padded = prepare_mixed_block(
            *requests, table, rows=self._target.rows_for(round.packed_rows, len(rows))
        )
        # Grammars go by the requests one by one: for their batches the host waits for the widths.
        host_widths = widths.tolist() if self._host.exact or batch.has_grammar else None
        block = padded if host_widths is None else packed(padded, sum(host_widths))
        if owners is not None:
            block = block._replace(request_of_row=owners[block.request_of_row])
        masks = None
        if host_widths is not None and batch.has_grammar:
            masks = grammar_trees(block, host_widths[: len(round)], round.ahead, strands)
        greedy = not batch.return_logprob and sampling.is_plain_greedy(batch.sampling_info, batch.has_grammar)
        # What the end of a graph commits is the rows as they are packed: strands must be folded before.
        self._epilogue.let_graphs_commit(greedy and not strands, round.row_ids)
        with _strands_as_requests(batch, starts, rows) if strands else nullcontext():
            verified = self._target.verify(batch, padded, widths, host_widths, round.stride)
        predictions = None
        if greedy and verified.committed is None:
            predictions = verified.logits.argmax(-1)
        elif not greedy:
            text, output = self._tokens.data, verified.output
            masks = self._built(batch, masks, barrier)
            predictions = sampling.sample_rows(self._target.runner, batch, output, block, round, masks, text)
            if masks is not None and masks.rejected:
                block = _rejecting(block, masks.rejected)
                verified = verified._replace(input_ids=block.input_ids)
        verified = verified._replace(starts=round.starts, request_rows=round.rows, predictions=predictions)
        for hook in self._hooks:
            verified = hook.verified(verified, block)
        return self._folded(round, block, verified) if strands else verified

    def _built(self, batch: Any, masks: Masks | None, barrier: Any) -> Masks | None:
        """`masks` when their bits are made; None if no request has a grammar."""
        if masks is not None and barrier is not None:
            barrier()
        return masks if masks is not None and masks.build(batch, self._spending) else None

    def _folded(self, round: Round, block: MixedBlock, verified: Verified) -> Verified:
        """The accepted path of every request as a chain; what was right of a strand moves behind its fork."""
        assert verified.predictions is not None  # no graph commits for strands
        kept, indptr, round.accepted = fold(block, verified.predictions, len(round), round.strands)
        if any(right for _, right in round.accepted):
            self._target.move(*moves(round.accepted, round.row_ids, round.most, self._target.slot_table))
        if kept is not None:  # else those of the first chains are the first of all
            sampling.keep_rows(verified.output, kept)
        return accepted_rows(verified, kept, indptr)


@contextmanager
def _strands_as_requests(batch: Any, starts: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """`batch` as a forward with strands takes it, for whom each is one more request. starts, rows: of all."""
    lengths = starts.tolist()
    known = {name: getattr(batch, name) for name in _PER_REQUEST}
    batch.seq_lens = batch.orig_seq_lens = starts
    batch.seq_lens_cpu, batch.seq_lens_sum = torch.tensor(lengths), sum(lengths)
    batch.req_pool_indices = rows
    try:
        yield
    finally:
        for name, value in known.items():
            setattr(batch, name, value)


_PER_REQUEST = ("seq_lens", "orig_seq_lens", "seq_lens_cpu", "seq_lens_sum", "req_pool_indices")
"""What a forward reads of a batch's requests."""


def _rejecting(block: MixedBlock, rows: Sequence[int]) -> MixedBlock:
    """`block` as it is judged if the drafts in `rows` are wrong whatever the target says."""
    ids = block.input_ids.clone()
    ids[list(rows)] = NO_TOKEN  # equals no prediction
    return block._replace(input_ids=ids)


def packed(block: MixedBlock, rows: int) -> MixedBlock:
    """`block` without the padding behind its first `rows` rows."""
    return block._replace(
        input_ids=block.input_ids[:rows],
        positions=block.positions[:rows],
        cache_slots=block.cache_slots[:rows],
        request_of_row=block.request_of_row[:rows],
    )
