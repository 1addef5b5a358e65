"""Sample hooks of benchmarks: they replace sampled tokens by a recorded text, or pin the acceptance length."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from whiflash_kernels import MixedBlock

from whiflash_sglang.cache.tokens import NO_TOKEN
from whiflash_sglang.device.transfers import Upload, sent
from whiflash_sglang.records.core import SampleHook, Verified
from whiflash_sglang.spans.forced import forced_tokens
from whiflash_sglang.spans.hints import HintError

logger = logging.getLogger(__name__)

FREE = -1
"""Table entry of a position without a forced token."""


class Forcing(SampleHook):
    """Replaces sampled tokens by each request's recorded answer, from a table on the device.

    Args:
        rows: rows of the request table. width: positions per row: the context and one widest block after it.
        vocabulary: number of ids that the target has.
    """

    def __init__(self, rows: int, width: int, vocabulary: int, device: torch.device) -> None:
        self._table = torch.full((rows, width), FREE, dtype=torch.int64, device=device)
        self._vocabulary = vocabulary

    def begin(self, upload: Upload, row: int, req: Any) -> None:
        tokens, prompt = self._tokens(req), len(req.origin_input_ids)
        self._table[row] = FREE
        room = self._table.shape[1] - prompt
        place = self._table[row, prompt : prompt + len(tokens)]
        upload.then(tokens[:room], lambda answer: place.copy_(answer))

    def prefilled(self, reqs: Sequence[Any], ends: Sequence[int], sampled: torch.Tensor) -> torch.Tensor:
        forced = []
        for req, end in zip(reqs, ends, strict=True):
            index, tokens = end - len(req.origin_input_ids), self._tokens(req)
            forced.append(tokens[index] if 0 <= index < len(tokens) else FREE)
        there = sent(forced, sampled.device).to(sampled.dtype)
        return torch.where(there != FREE, there, sampled)

    def verified(self, verified: Verified, block: MixedBlock) -> Verified:
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


PLACEHOLDER = 100
"""Token id that SGLang's simulated acceptance commits in place of real ones (`apply_dflash_simulated_acceptance`)."""


class PinnedAcceptance(SampleHook):
    """Pins the acceptance length of every round, to measure what rounds cost; their text means nothing.

    Args:
        draw: returns the tokens that every request shall commit this round, bonus token included. real: commit the
            drafts and the target's own token after them; otherwise `PLACEHOLDER`.
    """

    def __init__(self, draw: Callable[[], int], *, real: bool) -> None:
        self._draw, self._real = draw, real

    def verified(self, verified: Verified, block: MixedBlock) -> Verified:
        """Replace predictions so that the drawn number of tokens is committed. A request with fewer rows commits all
        of them, or those before the first draft that must not be accepted (NO_TOKEN).
        """
        predictions, ids, indptr = verified.predictions, verified.input_ids, verified.indptr
        length = self._draw()
        assert predictions is not None
        row = torch.arange(len(ids), device=ids.device)
        owner = torch.bucketize(row, indptr[1:-1], right=True)
        place, last = row - indptr[owner], indptr[owner + 1] - 1
        may, drafted = ids != NO_TOKEN, ids.roll(-1)  # NO_TOKEN: a draft that was not masked in time
        if self._real:
            agrees = (place < length - 1) & (row < last) & may.roll(-1)
            predictions = torch.where(agrees, drafted, predictions)
        else:
            predictions = torch.full_like(predictions, PLACEHOLDER)
        agreed = torch.where((place < length) & may, predictions.roll(1), FREE)
        return verified._replace(predictions=predictions, input_ids=agreed)
