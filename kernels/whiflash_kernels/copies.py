"""Copying on the device: what followed the earlier occurrences of a text's end, and how far to trust it."""

from torch import Tensor

from whiflash_kernels.dispatch import implementation
from whiflash_kernels.structs import Copies


def propose_copies(
    tokens: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    back: Tensor,
    limits: Tensor,
    factors: Tensor,
    chances: Tensor,
    boundaries: Tensor,
    *,
    width: int,
    worth: float,
    min_match: int = 1,
    behind: tuple[Tensor, Tensor] | None = None,
) -> Copies:
    """Propose for every request what followed an earlier occurrence of its text's end.

    Request b's text is t = tokens[request_slots[b], :L], L = seq_lens[b] + 1: the bonus token is known. With
    ``behind`` = (counts, alive) what is proposed goes behind counts[b] drafts, which the caller has written behind the
    text: L = seq_lens[b] + 1 + counts[b]. A place s, 0 < s < L, matches by m(s), the largest m <= 32 with
    t[s - 1 - i] = t[L - 1 - i] for all i < m. Compared are the newest 8 places with m >= 2, or where there are none
    those with m = 1, and where the last copy would go on, L - back[request_slots[b]]; those with m < ``min_match`` are
    left out. The longest match is copied from, the newest of equals, the last copy's before all of its length. After
    the text's end a copy goes on with what it copied. Without ``behind`` back[request_slots[b]] becomes L - s where a
    place s was copied from.

    Token d's chance is chances[b, k, a]: k the last bucket with boundaries[k] <= m + d, a how the places that agreed
    so far judge it: 0 there is one, 1 all say the same, 2 they differ and the longest match of those that say it is
    longer than of those that do not, 3 it is not. The first is multiplied by factors[b]; none is above 0.995. With
    c(d) the product of the chances up to d, times that of the last draft with ``behind``, tokens are proposed as long
    as c(d) >= ``worth``, the first in any case without ``behind``; limits[b] at most, with ``behind`` the drafts among
    them, and none where there is no draft.

    Args:
        tokens: [slots, context] int64, last dimension contiguous.
        request_slots: [B] int64 or int32, pairwise different. seq_lens: [B] int64 or int32.
        back: [slots] int64, contiguous: from how far back each request copied last, 0 where it has not; written in
            place without ``behind``.
        limits: [B] int64 or int32.
        factors: [B] float32, how much better or worse than others this request's copies begin.
        chances: [B, K, 4] float32, contiguous. boundaries: [K] int32, increasing, boundaries[0] <= 1.
        width: columns of the result, at least 1.
        behind: counts [B] int64 and alive [B, D] float32, last dimension contiguous, the chance of every draft and all
            before it, D at least 1.

    Returns:
        `Copies`.

    Raises:
        ValueError: ``width`` below 1, or ``chances`` does not fit ``boundaries`` and the batch.

    Grid: (B) twice: one program walks a request's text from its end until it has the places, one judges them.
    Capturable.
    Numerics: integers; chances in float32, multiplied in order.
    Fallback: torch, which reads the longest length back to the host.
    Compared: SGLang's NGRAM and ArcticInference's suffix trees are host structures, so that a round waits for the
    previous one's tokens on the host.
    Source: prompt lookup decoding; the bucketed chances are `whiflash_sglang.lookup.calibration`'s.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    expected = (request_slots.shape[0], boundaries.shape[0], 4)
    if chances.shape != expected:
        raise ValueError(f"chances must be {expected}, got {tuple(chances.shape)}")
    arguments = (tokens, request_slots, seq_lens, back, limits, factors, chances, boundaries)
    return implementation(tokens, "copies").propose_copies(*arguments, width, worth, min_match, behind)
