"""What a round tells beside its tokens, log-probabilities and hidden states, laid out for SGLang's scheduler."""

from typing import Any

import torch

from whiflash_sglang.compat.target import Verified

_LISTS = (
    "next_token_top_logprobs_val",
    "next_token_top_logprobs_idx",
    "next_token_token_ids_logprobs_val",
    "next_token_token_ids_logprobs_idx",
)
"""SGLang's records that have one entry a row."""


def attach(batch: Any, verified: Verified, indptr: torch.Tensor, stride: int) -> None:
    """Lay out the records of the packed rows as those of the tokens: `stride` columns a request.

    Rows of request b begin at `indptr[b]`, [B + 1] int32.

    Where a request has fewer rows its last one fills the columns: nobody reads them.
    """
    if not (batch.return_logprob or batch.return_hidden_states):
        return
    output = verified.output
    columns = torch.arange(stride, device=indptr.device)
    last = indptr[1:, None].to(torch.int64) - 1
    index = torch.minimum(indptr[:-1, None].to(torch.int64) + columns, last)
    if batch.return_logprob:
        output.next_token_logprobs = output.next_token_logprobs[index]
        flat = index.flatten().tolist()
        for name in _LISTS:
            if rows := getattr(output, name):
                setattr(output, name, [rows[row] for row in flat])
    if batch.return_hidden_states:
        if verified.final_hidden is None:
            raise AssertionError("SGLang admits such requests only where the server keeps hidden states")
        output.hidden_states = verified.final_hidden[index.flatten()]
