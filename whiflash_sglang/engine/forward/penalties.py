"""Penalties at every verified position, as plain decoding would have them there. Imports no SGLang.

Upstream's speculative workers hold a request's penalties for a whole block or drop them; a draft at position k must
be judged as after the committed tokens plus drafts 1…k, or the output distribution changes with the block. Lengths and
widths are the device's alone: nothing is read from it, and operators do not grow with the requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from whiflash_sglang.device.transfers import Upload

_NOWHERE = 1 << 40
"""Beginning of the answer of a request without penalties: after every position."""


@dataclass(frozen=True, slots=True)
class PenaltyRequest:
    """One penalised request of a batch.

    member: which of the batch. prompt: prompt tokens. length: n at most, so that positions prompt..n hold generated
    tokens, the bonus token last. stop_ids: tokens that min_new_tokens forbids.
    """

    member: int
    prompt: int
    length: int
    frequency: float
    presence: float
    repetition: float
    min_new_tokens: int
    stop_ids: tuple[int, ...]

    @property
    def counts(self) -> bool:
        """Whether it matters which tokens were generated, and not only how many."""
        return bool(self.frequency or self.presence or self.repetition != 1.0)


class PenalisedBatch:
    """Penalties of a batch, on the device by one upload; ask for rows by `at`.

    Args:
        requests: those that are penalised, at least one. table_rows: [B] int64 rows of the token table. starts: [B]
            int64, n. tokens: [request rows, ctx] int64 the token table, with this round's drafts already written
            behind n. widest: most rows of a request. vocab: V.
    """

    def __init__(
        self,
        requests: Sequence[PenaltyRequest],
        table_rows: torch.Tensor,
        starts: torch.Tensor,
        tokens: torch.Tensor,
        widest: int,
        vocab: int,
    ) -> None:
        self._tokens, self._vocab, self._widest = tokens, vocab, widest
        # The last entry of every list is neutral: it serves the requests that are not penalised.
        place = [len(requests)] * len(starts)
        for i, r in enumerate(requests):
            place[r.member] = i
        upload, neutral = Upload(), PenaltyRequest(0, _NOWHERE, 0, 0.0, 0.0, 1.0, -_NOWHERE, ())
        entries = [*requests, neutral]
        upload.ints(place)
        upload.ints([r.member for r in entries])
        upload.ints([r.prompt for r in entries])
        upload.ints([r.prompt + r.min_new_tokens for r in entries])
        upload.floats([*(r.frequency for r in entries), *(r.presence for r in entries)])
        upload.floats([r.repetition for r in entries])
        self._scales = any(r.repetition != 1.0 for r in requests)
        self._forbids = any(r.min_new_tokens > 0 and r.stop_ids for r in requests)
        stops = max(len(r.stop_ids) for r in entries)
        upload.ints([id for r in entries for id in (*r.stop_ids, *[0] * (stops - len(r.stop_ids)))])
        upload.floats(
            [x for r in entries for x in [-inf] * len(r.stop_ids) + [0.0] * (stops - len(r.stop_ids))]
        )
        (self._place, members, prompts, enough, ids), floats = upload.send(tokens.device)
        # Nothing is counted of the neutral one, whatever a row's position.
        self._of = torch.stack([table_rows[members], torch.maximum(starts[members], prompts - 1), enough])
        self._subtracted, self._scaled = floats[0].view(2, -1, 1), floats[1][:, None]
        self._stops, self._forbidden = (t.view(len(entries), -1) for t in (ids, floats[2]))
        self._counted: torch.Tensor | None = None
        if any(r.counts for r in requests):
            longest = max(r.length - r.prompt + 1 for r in requests)
            self._counted = torch.zeros((len(entries), vocab), dtype=torch.float32, device=tokens.device)
            places = prompts[:, None] + torch.arange(longest, device=tokens.device)
            self._count(self._counted, self._of[0], places, self._of[1])

    def at(self, owner: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, V] float32 each: what is added to logits of packed rows, and repetition factors, if any.

        Rows of requests that are not penalised are neutral.

        A row at position p has generated positions prompt..p: the committed tokens and its own drafts.

        Args:
            owner: [T] int64, which of the batch; any where nobody looks. positions: [T] int64.
        """
        place, scaling = self._place[owner], None
        rows, starts, enough = self._of[:, place]
        if self._counted is None:
            additive = torch.zeros((len(place), self._vocab), device=self._tokens.device)
        else:
            counts = self._counted[place]
            if self._widest > 1:
                ahead = torch.arange(1, self._widest, device=place.device)
                self._count(counts, rows, starts[:, None] + ahead, positions)
            met, (frequency, presence) = counts > 0, self._subtracted[:, place]
            additive = counts.mul_(-frequency).sub_(met * presence)
            if self._scales:
                scaling = torch.where(met, self._scaled[place], 1.0)
        if self._forbids:
            short = positions + 1 < enough
            additive.scatter_add_(1, self._stops[place], self._forbidden[place].where(short[:, None], 0.0))
        return additive, scaling

    def _count(
        self, counts: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, last: torch.Tensor
    ) -> None:
        """Add to counts [N, V] what table rows [N] have at places [N, L], up to last [N]: behind it they hold what
        earlier requests left, whose images have ids that are no tokens.
        """
        known = places <= last[:, None]
        tokens = self._tokens[rows[:, None], places.clamp(max=self._tokens.shape[1] - 1)]
        counts.scatter_add_(1, tokens.where(known, 0), known.to(torch.float32))
