"""Copying on the device: what followed the earlier occurrences of a text's end, and how far to trust it."""

from torch import Tensor

from whiflash_kernels.dispatch import backend_for
from whiflash_kernels.structs import Copies

PLACES = 8
"""Earlier occurrences that are compared, the newest of them."""
MOST_MATCHED = 32
"""Longest match that is told apart from longer ones."""
SURE = 0.995
"""No token's chance is higher: even a long run ends."""


def propose_copies(
    tokens: Tensor,
    request_slots: Tensor,
    lengths: Tensor,
    sources: Tensor,
    limits: Tensor,
    alive: Tensor,
    factors: Tensor,
    chances: Tensor,
    boundaries: Tensor,
    *,
    width: int,
    worth: float,
    min_match: int = 1,
    keep_first: bool = True,
) -> Copies:
    """Propose for every request what followed an earlier occurrence of its text's end.

    Request b's text is t = tokens[request_slots[b], :L], L = lengths[b]; drafts written behind the committed tokens
    are part of it, so the same call prolongs them. A place s, 0 < s < L, matches by m(s), the largest m <= 32 with
    t[s - 1 - i] = t[L - 1 - i] for all i < m. Compared are the newest 8 places with m >= 2, or where there are none
    those with m = 1, and the place ``sources[b]`` where the last copy would go on; those with m < ``min_match`` are
    left out. The longest match is copied from, the newest of equals, ``sources[b]`` before all of its length. After
    the text's end a copy goes on with what it copied.

    Token d's chance is chances[b, k, a]: k the last bucket with boundaries[k] <= m + d, a how the places that agreed
    so far judge it: 0 there is one, 1 all say the same, 2 they differ and the longest match of those that say it is
    longer than of those that do not, 3 it is not. The first is multiplied by factors[b]; none is above 0.995. With
    c(d) the product of the chances up to d times alive[b], tokens are proposed as long as c(d) >= ``worth``; the
    first in any case under ``keep_first``.

    Args:
        tokens: [slots, context] int64, last dimension contiguous.
        request_slots, lengths: [B] int64 or int32. sources: [B] int64, 0 or less where there is none.
        limits: [B] int64 or int32, most tokens proposed for a request.
        alive: [B] float32, chance that everything before the copy is accepted.
        factors: [B] float32, how much better or worse than others this request's copies begin.
        chances: [B, K, 4] float32, contiguous. boundaries: [K] int32, increasing, boundaries[0] <= 1.
        width: columns of the result, at least 1.

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
    arguments = (tokens, request_slots, lengths, sources, limits, alive, factors, chances, boundaries)
    if backend_for(tokens) == "triton":
        from whiflash_kernels.triton_kernels import copies as kernels

        return kernels.propose_copies(*arguments, width, worth, min_match, keep_first)
    from whiflash_kernels.reference import copies as reference

    return reference.propose_copies(*arguments, width, worth, min_match, keep_first)
