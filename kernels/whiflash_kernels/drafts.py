"""Drafts of a batch between drafting and verification: cut, laid side by side, chosen among."""

from collections.abc import Sequence

from torch import Tensor

from whiflash_kernels.dispatch import implementation
from whiflash_kernels.structs import Chosen, Drafts, HostDrafts


def cut_drafts(
    confidences: Tensor, calibration: Tensor, edges: Tensor, limits: Tensor, *, worth: float
) -> tuple[Tensor, Tensor]:
    """How many of a drafter's tokens are worth their rows, from how sure it is of each.

    With bin(c) = the number of edges <= c: alive[m, i] = the product of calibration[bin(confidences[m, j])] over
    j <= i, and counts[m] = min(limits[m], 1 + the number of i >= 1 with alive[m, i] >= worth). The first is always
    kept, so that a drafter that was wrong for a while is not forgotten. Chances are at most 1, so those kept are the
    first of each row.

    Args:
        confidences: [M, W] float32, W at least 1.
        calibration: [E + 1] float32 or longer: the chance of acceptance of each bin.
        edges: [E] float32, ascending.
        limits: [M] int64 or int32.
        worth: chance below which a token is not verified.

    Returns:
        counts [M] int64 and alive [M, W] float32, new.

    Raises:
        ValueError: shapes that do not fit each other.

    Grid: (M), one launch, graph-capturable.
    Numerics: float32, multiplied in order.
    Fallback: torch.
    Source: draft lengths by the chance that everything so far is right, as SpecDec++, arXiv 2405.19715.
    """
    if confidences.ndim != 2 or confidences.shape[1] < 1 or limits.shape != confidences.shape[:1]:
        raise ValueError(
            f"confidences must be [M, W] with limits [M], got {tuple(confidences.shape)} and {tuple(limits.shape)}"
        )
    if calibration.shape[0] <= edges.shape[0]:
        raise ValueError(f"{edges.shape[0]} edges part more bins than {calibration.shape[0]} chances are for")
    return implementation(confidences, "drafts").cut_drafts(confidences, calibration, edges, limits, worth)


def lay_drafts(
    parts: Sequence[tuple[Tensor, Drafts]],
    request_slots: Tensor,
    seq_lens: Tensor,
    *,
    width: int,
    confidences: int,
    vocabulary: int,
    text: Tensor | None = None,
) -> Drafts:
    """Put the drafts of several drafters side by side, each in the rows of its own requests.

    For member m of a part and b = members[m]: row b of every output is row m of the part's, cut or padded to the
    output's columns: ids and confidences by 0, chances by 1, also where a drafter has none. Requests of no part have
    counts 0.

    A drafter is not trusted: ids are clamped to 0 <= id < ``vocabulary``. With f = the first column whose id that
    changed, or whose chance or confidence is NaN (W where there is none), counts[b] = min(max(counts[m], 0), f), and
    faults[b] = 1 where that is another number than the drafter's own.

    With ``text`` text[request_slots[b], seq_lens[b] + 1 + i] =
    tokens[b, i] for the requests of some part and i < width: what goes on behind a draft can be looked up there.

    Args:
        parts: of each drafter its members [M] int64, indices of the batch, and its drafts for them; no index twice.
        request_slots: [B] int64 or int32. seq_lens: [B] int64 or int32.
        width: columns of ``tokens`` and ``alive``, W. confidences: columns of ``confidences``.
        vocabulary: ids that the target has.
        text: [slots, context] int64, last dimension contiguous, with ``width`` columns behind the longest length;
            written in place.

    Returns:
        `Drafts` of B requests, new, with chances, confidences and faults.

    Grid: (B), a launch for each part, graph-capturable.
    Numerics: a copy.
    Fallback: torch.
    Source: batching of heterogeneous drafters, WhiFlash, arXiv 2606.07710.
    """
    arguments = (parts, request_slots, seq_lens, width, confidences, vocabulary, text)
    return implementation(request_slots, "drafts").lay_drafts(*arguments)


def choose_drafts(
    drafts: Drafts,
    request_slots: Tensor,
    seq_lens: Tensor,
    text: Tensor,
    *,
    own: Tensor | None = None,
    appended: Drafts | None = None,
    from_host: HostDrafts | None = None,
    copies: Drafts | None = None,
    rooms: Tensor | None = None,
    worth: float = 0.0,
    room: int | None = None,
) -> Chosen:
    """Which drafts are verified: what goes behind them, what takes their place, and as many as there are rows for.

    Behind request b's counts[b] drafts come its appended.counts[b]. These are voice 0. The host's k-th counts as far as
    the text agrees: with a = seq_lens[b] + 1 - at[b, k], the tokens that were committed since it was said,
    tokens[b, k, :a] must be text[request_slots[b], at[b, k] : seq_lens[b] + 1]. Then its tokens from a on are drafts,
    ``rooms[b]`` at most, each with the chance alive[b, k, i] / alive[b, k, a - 1]. The copies are the last voice. They
    do not count if the host's first voice pays its rows: it is the copying arm's, which chose among more places. The
    voice with the largest sum of (chance - ``worth``) is verified, the first of equals, voice 0 if no other's sum is
    more than its own. Last, with ``room``, requests compete. The ``room`` drafts with the largest ``alive`` of the
    batch are kept. Equals go to the earlier place in a request, then to the earlier request. A draft is never likelier
    than those before it, so each request keeps its first ones.

    Args:
        drafts: `lay_drafts`'.
        request_slots: [B] int64 or int32, pairwise different. seq_lens: [B] int64 or int32.
        text: [slots, context] int64, last dimension contiguous, with W columns behind the longest length, the token at
            every position up to seq_lens[b]; written in place: text[request_slots[b], seq_lens[b] + 1 + i] =
            tokens[b, i] for all i < W.
        own: [B] int64, how many of the first drafts are the requests' own arms'; None: all that were laid.
        appended: tokens [B, E], counts [B], alive [B, E] or None (0 then). They fit in.
        from_host: contiguous. rooms: [B] int64, needed with it.
        copies: tokens [B, L], counts [B] of at most W, alive [B, L], all contiguous.
        worth: what a row must bring.
        room: drafts of the batch at most; None: all.

    Returns:
        `Chosen`, new.

    Raises:
        ValueError: ``from_host`` without ``rooms``, or ``drafts`` or ``copies`` without chances.

    Grid: (B), a second launch where requests compete; graph-capturable.
    Numerics: chances are compared and their sum taken in float32.
    Fallback: torch (a stable sort of all chances).
    Compared: SGLang's DSpark plans widths of one drafter from a table of the whole batch; here drafts of several are
    put together, and the rows are bounded.
    Source: adaptive verification; WhiFlash, arXiv 2606.07710.
    """
    if from_host is not None and rooms is None:
        raise ValueError("the host's voices need rooms")
    if drafts.alive is None or (copies is not None and copies.alive is None):
        raise ValueError("drafts and copies need chances")
    arguments = (drafts, request_slots, seq_lens, text, own, appended, from_host, copies, rooms, worth, room)
    return implementation(request_slots, "drafts").choose_drafts(*arguments)
