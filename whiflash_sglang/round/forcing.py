"""Answers forced along a recorded text, and acceptance pinned to a length: for benchmarks.

What the target sampled is replaced once it was sampled. Imports no SGLang. A server has one of these only where its
flag or its environment says so.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from whiflash_kernels import MixedBlock

from whiflash_sglang.core import Verified
from whiflash_sglang.device.transfers import Upload, sent
from whiflash_sglang.spans.forced import forced_tokens
from whiflash_sglang.spans.hints import HintError

logger = logging.getLogger(__name__)

FREE = -1
"""Where nothing is forced."""


class Forcing:
    """The forced tokens of running requests, on the device.

    Args:
        rows: of the request table. width: positions of each, with the widest block behind the context's end.
        vocabulary: ids that the target has.
    """

    def __init__(self, rows: int, width: int, vocabulary: int, device: torch.device) -> None:
        self._table = torch.full((rows, width), FREE, dtype=torch.int64, device=device)
        self._vocabulary = vocabulary

    def begin(self, upload: Upload, row: int, req: Any) -> None:
        """A request begins in `row`, or begins again; its answer is forced when `upload` has been sent."""
        tokens, prompt = self._tokens(req), len(req.origin_input_ids)
        self._table[row] = FREE
        room = self._table.shape[1] - prompt
        place = self._table[row, prompt : prompt + len(tokens)]
        upload.then(tokens[:room], lambda answer: place.copy_(answer))

    def first(self, reqs: Sequence[Any], ends: Sequence[int], sampled: torch.Tensor) -> torch.Tensor:
        """What prefills sampled, [B], for the positions `ends`; forced where it is the answer's."""
        forced = []
        for req, end in zip(reqs, ends, strict=True):
            index, tokens = end - len(req.origin_input_ids), self._tokens(req)
            forced.append(tokens[index] if 0 <= index < len(tokens) else FREE)
        found = sent(forced, sampled.device).to(sampled.dtype)
        return torch.where(found != FREE, found, sampled)

    def over(self, predictions: torch.Tensor, block: MixedBlock, rows: torch.Tensor) -> torch.Tensor:
        """`predictions` [T] at the rows of `block`, whose requests are in `rows` [B]; forced where they shall be."""
        forced = self._table[rows[block.request_of_row], block.positions + 1]
        return torch.where(forced != FREE, forced, predictions)

    def _tokens(self, req: Any) -> list[int]:
        try:
            return forced_tokens(req.sampling_params.custom_params, self._vocabulary)
        except HintError as error:
            logger.warning("request %s: a malformed forced answer is ignored (%s)", req.rid, error)
            return []


PLACEHOLDER = 100
"""SGLang's token where simulated acceptance commits no real ones (`apply_dflash_simulated_acceptance`)."""


class Pinned:
    """A round's acceptance, pinned: the cost of rounds is measured, their text means nothing.

    Args:
        draw: tokens that every request shall commit this round, the bonus token among them. real: drafts are committed,
            and the target's own token behind them; else `PLACEHOLDER`.
    """

    def __init__(self, draw: Callable[[], int], *, real: bool) -> None:
        self._draw, self._real = draw, real

    def over(self, rows: Verified) -> Verified:
        """`rows` as if the target had agreed with as many drafts; a request with fewer rows commits all of them."""
        predictions, ids, length = rows.predictions, rows.input_ids, self._draw()
        assert predictions is not None
        row = torch.arange(len(ids), device=ids.device)
        owner = torch.bucketize(row, rows.indptr[1:-1], right=True)
        place, last = row - rows.indptr[owner], rows.indptr[owner + 1] - 1
        if self._real:
            predictions = torch.where((place < length - 1) & (row < last), ids.roll(-1), predictions)
        else:
            predictions = torch.full_like(predictions, PLACEHOLDER)
        agreed = torch.where(place < length, predictions.roll(1), FREE)
        return rows._replace(predictions=predictions, input_ids=agreed)
