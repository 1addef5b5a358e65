"""One target forward over the packed rows of a mixed batch, and the target's own token at every row."""

from typing import Any

from whiflash_kernels import prepare_mixed_block

from whiflash_sglang.cache.tokens import TokenTable
from whiflash_sglang.compat import sampling
from whiflash_sglang.compat.target import Target, Verified, packed
from whiflash_sglang.core import RoundBatch
from whiflash_sglang.device.host_view import HostView
from whiflash_sglang.round.draft import Proposal
from whiflash_sglang.round.epilogue import Epilogue, VerifiedRows
from whiflash_sglang.round.forcing import Forcing


class VerifyStage:
    """What the target says of drafts.

    Args:
        tokens: committed text, for penalties. epilogue: what graphs of the target's end with, where they may.
        forcing: replaces what was sampled, for benchmarks; None: nothing does.
    """

    def __init__(
        self,
        target: Target,
        tokens: TokenTable,
        host: HostView,
        epilogue: Epilogue,
        forcing: Forcing | None,
    ) -> None:
        self._target, self._tokens, self._host = target, tokens, host
        self._epilogue, self._forcing = epilogue, forcing

    def verify(
        self, batch: Any, requests: RoundBatch, proposal: Proposal, barrier: Any
    ) -> tuple[VerifiedRows, Verified]:
        """Run the target over bonus tokens and drafts.

        Args:
            barrier: of SGLang: what a grammar needs before its masks are made.

        Returns:
            The packed rows, and what the target said of them.
        """
        padded = prepare_mixed_block(
            requests.bonus,
            proposal.tokens,
            proposal.widths,
            requests.starts,
            requests.rows,
            self._target.slot_table,
            rows=self._target.rows_for(proposal.rows, len(requests.row_ids)),
        )
        # Grammars and penalties go by the requests one by one: for their batches the host waits for the widths.
        by_request = batch.has_grammar or any(sampling.is_penalised(req) for req in batch.reqs)
        widths = proposal.widths.tolist() if self._host.exact or by_request else None
        block = padded if widths is None else packed(padded, sum(widths))
        chains = None
        if widths is not None and batch.has_grammar:
            chains = sampling.grammar_chains(block, widths, requests.ahead)
        greedy = not batch.return_logprob and sampling.is_plain_greedy(batch.sampling_info, batch.has_grammar)
        self._epilogue.let_graphs_commit(greedy, requests.row_ids)
        verified = self._target.verify(batch, padded, proposal.widths, widths, proposal.stride)
        predictions = None
        if greedy and verified.outcome is None:
            predictions = verified.logits.argmax(-1)
        elif not greedy:
            # Sampling works in place; the controller reads the raw distribution.
            verified.output.next_token_logits = verified.logits.clone()
            predictions = sampling.sample_rows(
                self._target.runner,
                batch,
                verified.output,
                block,
                widths,
                chains,
                self._tokens.data,
                barrier,
            )
        if self._forcing is not None and predictions is not None:
            predictions = self._forcing.over(predictions, block, requests.rows)
        rows = VerifiedRows(
            verified.logits,
            verified.features,
            verified.final_hidden,
            block.input_ids,
            block.qo_indptr,
            requests.starts,
            requests.rows,
            predictions,
            verified.outcome,
        )
        return rows, verified
