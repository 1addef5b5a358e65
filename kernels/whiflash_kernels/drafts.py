"""Drafts of a batch between drafting and verification: cut, laid side by side, prolonged, chosen among."""

from collections.abc import Sequence

from torch import Tensor

from whiflash_kernels.dispatch import implementation
from whiflash_kernels.structs import Chosen, Drafted, Laid


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
    parts: Sequence[Drafted],
    request_slots: Tensor,
    seq_lens: Tensor,
    *,
    width: int,
    confidences: int,
    vocabulary: int,
    text: Tensor | None = None,
) -> Laid:
    """Lay the drafts of several drafters side by side, each in the rows of its own requests.

    For member m of a part and b = members[m]: row b of every output is row m of the part's, cut or padded to the
    output's columns. Requests of no part have counts 0.

    A drafter is not trusted: ids are clamped to 0 <= id < ``vocabulary``. With f = the first column whose id that
    changed, or whose chance or confidence is NaN (W where there is none), counts[b] = min(max(counts[m], 0), f), and
    faults[b] = 1 where that is another number than the drafter's own.

    With ``text`` text[request_slots[b], seq_lens[b] + 1 + i] =
    tokens[b, i] for the requests of some part and i < width: what goes on behind a draft can be looked up there.

    Args:
        parts: each drafter's; no request is a member twice.
        request_slots: [B] int64 or int32. seq_lens: [B] int64 or int32.
        width: columns of ``tokens`` and ``alive``, W. confidences: columns of ``confidences``.
        vocabulary: ids that the target has.
        text: [slots, context] int64, last dimension contiguous, with ``width`` columns behind the longest length;
            written in place.

    Returns:
        `Laid`, new.

    Grid: (B), a launch for each part, graph-capturable.
    Numerics: a copy.
    Fallback: torch.
    Source: batching of heterogeneous drafters, WhiFlash, arXiv 2606.07710.
    """
    arguments = (parts, request_slots, seq_lens, width, confidences, vocabulary, text)
    return implementation(request_slots, "drafts").lay_drafts(*arguments)


def join_drafts(
    laid: Laid,
    behind: Drafted,
    request_slots: Tensor,
    seq_lens: Tensor,
    *,
    after: Tensor | None = None,
    text: Tensor | None = None,
) -> Laid:
    """Put further drafts behind those of every request, where somebody is to go on behind both.

    With a = after[b], or counts[b]: columns a … a + behind.counts[b] - 1 of request b are behind's, and a +
    behind.counts[b] count; alive is 0 where ``behind`` cannot say. With ``text`` as `lay_drafts`, for all requests.

    Args:
        laid: as wide as all of them together.
        behind: of all B requests in order; members are not read.
        request_slots: [B] int64 or int32, pairwise different. seq_lens: [B] int64 or int32.
        after: [B] int64, at most the counts: the first so many drafts stay. None: all.
        text: [slots, context] int64, written in place.

    Returns:
        `Laid`; new but for its confidences.

    Grid: none of its own: torch on every device, since only arms that the host asks one after the other need it;
    what comes last goes behind by `choose_drafts`.
    Numerics: a copy.
    Source: WhiFlash, arXiv 2606.07710.
    """
    from whiflash_kernels.reference import drafts as reference

    return reference.join_drafts(laid, behind, request_slots, seq_lens, after, text)


def choose_drafts(
    laid: Laid,
    request_slots: Tensor,
    seq_lens: Tensor,
    text: Tensor,
    *,
    own: Tensor | None = None,
    behind: Drafted | None = None,
    late: Drafted | None = None,
    must_beat: Tensor | None = None,
    worth: float = 0.0,
    room: int | None = None,
) -> Chosen:
    """Which drafts are verified: what goes behind them, what takes their place, and as many as there are rows for.

    Behind request b's counts[b] drafts come its behind.counts[b]. Then, with ``late``, where it has drafts and
    sum over i < late.counts[b] of (late.alive[b, i] - worth) > must_beat[b], these take the place of all. Last, with
    ``room``, requests compete: kept are the ``room`` drafts with the largest ``alive`` of the batch, of equals the
    earlier in their request, then those of the earlier request. A draft is never likelier than those before it, so
    what is kept are the first of each request.

    Args:
        laid: `lay_drafts`'.
        request_slots: [B] int64 or int32, pairwise different. seq_lens: [B] int64 or int32.
        text: [slots, context] int64, last dimension contiguous, with W columns behind the longest length; written in
            place: text[request_slots[b], seq_lens[b] + 1 + i] = tokens[b, i] for all i < W.
        own: [B] int64, how many of the first drafts are the requests' own arms'; None: all that were laid.
        behind: tokens [B, E], counts [B], alive [B, E] or None (0 then); members are not read. They fit in.
        late: tokens [B, L], counts [B] of at most W, alive [B, L], all contiguous; members are not read.
        must_beat: [B] float32, needed with it.
        worth: what a row of ``late`` must bring.
        room: drafts of the batch at most; None: all.

    Returns:
        `Chosen`, new.

    Raises:
        ValueError: ``late`` without chances or ``must_beat``.

    Grid: (B), a second launch where requests compete; graph-capturable.
    Numerics: chances are compared and their sum taken in float32.
    Fallback: torch (a stable sort of all chances).
    Compared: SGLang's DSpark plans widths of one drafter from a table of the whole batch; here drafts of several are
    put together, and the rows are bounded.
    Source: adaptive verification; WhiFlash, arXiv 2606.07710.
    """
    if late is not None and (must_beat is None or late.alive is None):
        raise ValueError("late drafts need chances and must_beat")
    arguments = (laid, request_slots, seq_lens, text, own, behind, late, must_beat, worth, room)
    return implementation(request_slots, "drafts").choose_drafts(*arguments)
