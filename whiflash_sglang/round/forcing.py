"""Replace sampled tokens by a recorded text, for benchmarks (`--whiflash-force-recorded`)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from whiflash_kernels import MixedBlock

from whiflash_sglang.device.transfers import Upload, sent
from whiflash_sglang.records.core import Verified
from whiflash_sglang.spans.forced import forced_tokens
from whiflash_sglang.spans.hints import HintError

logger = logging.getLogger(__name__)

FREE = -1
"""Table entry of a position without a forced token."""


class Forcing:
    """Replaces sampled tokens by each request's recorded answer, from a table on the device.

    Args:
        rows: rows of the request table. width: positions per row: the context and one widest block after it.
        vocabulary: number of ids that the target has.
    """

    def __init__(self, rows: int, width: int, vocabulary: int, device: torch.device) -> None:
        self._table = torch.full((rows, width), FREE, dtype=torch.int64, device=device)
        self._vocabulary = vocabulary

    def begin(self, upload: Upload, row: int, req: Any) -> None:
        """Write a request's recorded answer into its row as it begins or resumes. upload: carries it to the device."""
        tokens, prompt = self._tokens(req), len(req.origin_input_ids)
        self._table[row] = FREE
        room = self._table.shape[1] - prompt
        place = self._table[row, prompt : prompt + len(tokens)]
        upload.then(upload.ints(tokens[:room]), lambda answer: place.copy_(answer))

    def prefilled(self, reqs: Sequence[Any], ends: Sequence[int], sampled: torch.Tensor) -> torch.Tensor:
        """Return the tokens to use in place of those that a prefill `sampled`, [B], for positions `ends`."""
        forced = []
        for req, end in zip(reqs, ends, strict=True):
            index, tokens = end - len(req.origin_input_ids), self._tokens(req)
            forced.append(tokens[index] if 0 <= index < len(tokens) else FREE)
        there = sent(forced, sampled.device).to(sampled.dtype)
        return torch.where(there != FREE, there, sampled)

    def verified(self, verified: Verified, block: MixedBlock) -> Verified:
        """Return `verified` with the tokens to use in place of those sampled at the rows of `block`."""
        predictions, rows = verified.predictions, verified.request_rows
        assert predictions is not None
        forced = self._table[rows[block.request_of_row], block.positions + 1]
        return verified._replace(predictions=torch.where(forced != FREE, forced, predictions))

    def _tokens(self, req: Any) -> list[int]:
        try:
            return forced_tokens(req.sampling_params.custom_params, self._vocabulary)
        except HintError as error:
            logger.warning("request %.64r: a malformed forced answer is ignored (%s)", req.rid, error)
            return []
