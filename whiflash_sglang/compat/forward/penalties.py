"""Penalties at every verified position, as plain decoding would have them there. Imports no SGLang.

Upstream's speculative workers hold a request's penalties for a whole block or drop them; a draft at position k must
be judged as after the committed tokens plus drafts 1…k, or the output distribution changes with the block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PenaltyRequest:
    """One penalised request of a batch.

    first_row: its first row of the packed block; width: its rows. prompt: prompt tokens; length: n, so that
    positions prompt..n hold generated tokens, the bonus token last.
    stop_ids: tokens that min_new_tokens forbids.
    """

    table_row: int
    first_row: int
    width: int
    prompt: int
    length: int
    frequency: float
    presence: float
    repetition: float
    min_new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Penalties:
    """additive: [T, V] float32 to add to the logits. scaling: [T, V] float32 repetition factors, or None."""

    additive: torch.Tensor
    scaling: torch.Tensor | None


def penalties_at(
    requests: Sequence[PenaltyRequest], tokens: torch.Tensor, rows: int, vocab: int
) -> Penalties | None:
    """Penalties of all T packed rows; rows of other requests are neutral.

    Row i of a request has generated positions prompt..n+i: the committed tokens and its own drafts 1…i.

    Args:
        tokens: [request rows, ctx] the token table, with this round's drafts already written after n.
        rows: T. vocab: V.

    Returns:
        None when nothing is penalised.
    """
    if not requests:
        return None
    additive = torch.zeros((rows, vocab), dtype=torch.float32, device=tokens.device)
    scaling = None
    for r in requests:
        block = additive[r.first_row : r.first_row + r.width]
        generated = tokens[r.table_row, r.prompt : r.length + r.width]
        known = generated[: r.length - r.prompt + 1]
        if r.frequency or r.presence or r.repetition != 1.0:
            counts = _counts(known, generated, r.width, vocab)
            if r.frequency:
                block.sub_(counts, alpha=r.frequency)
            if r.presence:
                block.sub_((counts > 0).to(torch.float32), alpha=r.presence)
            if r.repetition != 1.0:
                if scaling is None:
                    scaling = torch.ones_like(additive)
                scaling[r.first_row : r.first_row + r.width][counts > 0] = r.repetition
        short = r.min_new_tokens - (r.length - r.prompt + 1)
        if short > 0:
            block[:short, list(r.stop_ids)] = float("-inf")
    return Penalties(additive, scaling)


def _counts(known: torch.Tensor, generated: torch.Tensor, width: int, vocab: int) -> torch.Tensor:
    """[width, V] float32: how often each token was generated before the token that a row predicts."""
    counts = torch.zeros((width, vocab), dtype=torch.float32, device=known.device)
    counts[0].scatter_add_(0, known, torch.ones_like(known, dtype=torch.float32))
    drafts = generated[known.shape[0] :]
    if width > 1:
        counts[1:] = counts[0]
        step = torch.arange(1, width, device=known.device)
        later = step[:, None] >= step[None, :]  # draft j counts in the rows at and after it
        counts[1:].scatter_add_(1, drafts.expand(width - 1, -1), later.to(torch.float32))
    return counts
