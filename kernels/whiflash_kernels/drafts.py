"""Ops on a batch's drafts between drafting and verification: cut, put side by side, choose among them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.dispatch import op
from whiflash_kernels.structs import Chosen, Drafts


def _check_cut(confidences: Tensor, calibration: Tensor, edges: Tensor, limits: Tensor, **_: Any) -> None:
    if confidences.ndim != 2 or confidences.shape[1] < 1 or limits.shape != confidences.shape[:1]:
        raise ValueError(
            f"confidences must be [M, W] with limits [M], got {tuple(confidences.shape)} and {tuple(limits.shape)}"
        )
    if calibration.shape[0] < edges.shape[0] + 2:
        raise ValueError(f"{edges.shape[0]} edges part more bins than {calibration.shape[0] - 1} chances are for")


@op(_check_cut)
def cut_drafts(confidences: Tensor, calibration: Tensor, edges: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Count the drafts of each request that are worth their rows, from the drafter's confidence in each.

    With bin(c) = the number of edges <= c and worth = the last of calibration: alive[m, i] = the product of
    calibration[bin(confidences[m, j])] over j <= i, and counts[m] = min(limits[m], 1 + the number of i >= 1 with
    alive[m, i] >= worth). The first is always kept, so that a drafter that was wrong for a while is not forgotten.
    Chances are at most 1, so those kept are the first of each row.

    Args:
        confidences: [M, W] float32, W at least 1.
        calibration: [E + 2] float32 or longer: the chance of acceptance of each bin; the last is the chance below which
            a token is not verified.
        edges: [E] float32, ascending.
        limits: [M] int64 or int32.

    Returns:
        counts [M] int64 and alive [M, W] float32, new.

    Raises:
        ValueError: shapes that do not fit each other.

    Grid: (M), one launch, graph-capturable.
    Numerics: float32, multiplied in order.
    Fallback: torch.
    Source: draft lengths by the chance that everything so far is right, as SpecDec++, arXiv 2405.19715.
    """
    chances = calibration[torch.bucketize(confidences.contiguous(), edges, right=True)]
    alive = chances.cumprod(1)
    kept = (alive[:, 1:] >= calibration[-1]).sum(1) + 1
    return torch.minimum(kept, limits), alive


@op()
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
    faults[b] = 1 if that differs from counts[m].

    With ``text`` text[request_slots[b], seq_lens[b] + 1 + i] = tokens[b, i] for the requests of some part and i <
    width: continuations of the drafts can be looked up there.

    Args:
        parts: of each drafter its members [M] int64, indices of the batch, and its drafts for them; no index twice.
        request_slots: [B] int64 or int32. seq_lens: [B] int64 or int32.
        width: columns of ``tokens`` and ``alive``, W. confidences: columns of ``confidences``.
        vocabulary: ids that the target has.
        text: [slots, context] int64, last dimension contiguous, with ``width`` columns beyond the longest length;
            written in place.

    Returns:
        `Drafts` of B requests, new, with chances, confidences and faults.

    Grid: (B), a launch for each part, graph-capturable.
    Numerics: a copy.
    Fallback: torch.
    Source: batching of heterogeneous drafters, WhiFlash, arXiv 2606.07710.
    """
    size, device = len(request_slots), request_slots.device
    tokens = torch.zeros((size, width), dtype=torch.int64, device=device)
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    alive = torch.ones((size, width), device=device)
    sure = torch.zeros((size, confidences), device=device)
    faults = torch.zeros(size, dtype=torch.int32, device=device)
    for members, part in parts:
        _lay(tokens, members, part.tokens)
        counts.index_copy_(0, members, part.counts)
        if part.alive is not None:
            _lay(alive, members, part.alive)
        if part.confidences is not None:
            _lay(sure, members, part.confidences)
    if parts:
        drafted, proposed = tokens, counts
        tokens = drafted.clamp(0, vocabulary - 1)
        counts = torch.minimum(proposed.clamp(min=0), _sound(tokens, drafted, alive, sure))
        faults = (counts != proposed).to(torch.int32)
    if text is not None:
        for members, _ in parts:
            put_block(text, request_slots[members], seq_lens[members], tokens[members])
    return Drafts(tokens, counts, alive, sure, faults)


def _check_chosen(
    drafts: Drafts,
    *_: Any,
    from_host: Drafts | None = None,
    at: Tensor | None = None,
    copies: Drafts | None = None,
    limits: Tensor | None = None,
    drawn: Tensor | None = None,
    **__: Any,
) -> None:
    if drawn is not None and drafts.faults is None:
        raise ValueError("drafts that may fill rows need faults")
    if from_host is not None and (at is None or limits is None):
        raise ValueError("the host's candidates need their positions and limits")
    if any(source is not None and source.alive is None for source in (drafts, from_host, copies)):
        raise ValueError("drafts, candidates and copies need chances")


@op(_check_chosen)
def choose_drafts(
    drafts: Drafts,
    request_slots: Tensor,
    seq_lens: Tensor,
    text: Tensor,
    *,
    appended: Drafts | None = None,
    from_host: Drafts | None = None,
    at: Tensor | None = None,
    copies: Drafts | None = None,
    limits: Tensor | None = None,
    worth: float = 0.0,
    least: float = 0.0,
    most_drafts: int | None = None,
    stops: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Chosen:
    """Choose the drafts that are verified: a pass's with appended ones, the host's or copies, as far as rows suffice.

    Every candidate ends with its first token of ``stops``[request_slots[b]], since nothing after it can be accepted.
    Request b's counts[b] drafts and its appended.counts[b] after them are candidate 0. The host's k-th counts as far as
    the text agrees: with a = seq_lens[b] + 1 - at[b, k], the tokens that were committed since it was made, tokens[b, k,
    :a] must be text[request_slots[b], at[b, k] : seq_lens[b] + 1]. Then its tokens from a on are drafts, ``limits[b]``
    at most, each with the chance alive[b, k, i] / alive[b, k, a - 1], as long as that is at least ``least``. The copies
    are the last candidate. They do not count if the host's first one pays its rows: it is the copying arm's, which
    chose among more places. The candidate with the largest sum of (chance - ``worth``) is verified, the first of
    equals, candidate 0 if no other's sum is larger. Last, with ``most_drafts``, requests compete: only that many drafts
    of the batch are kept, those with the largest ``alive``. Equals go to the earlier place in a request, then to the
    earlier request. A draft is never likelier than those before it, so each request keeps its first ones. With
    ``drawn``, drafts beyond counts[b] compete, too, up to drawn[b]: they are not worth a row, but a graph has rows to
    spare. They do so if candidate 0 is verified, has no fault and no appended drafts.

    Args:
        drafts: `lay_drafts`'.
        request_slots: [B] int64 or int32, pairwise different. seq_lens: [B] int64 or int32.
        text: [slots, context] int64, last dimension contiguous, with W columns beyond the longest length, the token at
            every position up to seq_lens[b]; written in place: text[request_slots[b], seq_lens[b] + 1 + i] = tokens[b,
            i] for all i < W.
        appended: tokens [B, E], counts [B], alive [B, E] or None (0 then). They fit in.
        from_host: K candidates a request of a host that may know the text late: tokens and alive [B, K, L], counts [B,
            K], contiguous. at: [B, K] int64, contiguous, the position of each one's first token; limits: [B] int64;
            both needed with it.
        copies: tokens [B, L], counts [B] of at most W, alive [B, L], all contiguous.
        worth: accepted tokens that a row must bring. least: chance below which no token of the host's is verified.
        most_drafts: of the batch; None: all. drawn: [B] int64 or int32, the tokens that request b's pass drafted.
        stops: [slots, S] int64, contiguous, the tokens that end each request, -1 in further columns; None: none does.

    Returns:
        `Chosen`, new.

    Raises:
        ValueError: ``from_host`` without ``at`` or ``limits``, any of the three without chances, or ``drawn`` with
            drafts without faults.

    Grid: (B), a second launch where requests compete; graph-capturable.
    Numerics: chances are compared and their sum taken in float32.
    Fallback: torch (a stable sort of all chances).
    Compared: SGLang's DSpark plans widths of one drafter from a table of the whole batch; here drafts of several are
    put together, and the rows are bounded.
    Source: adaptive verification; WhiFlash, arXiv 2606.07710.
    """
    tokens, counts, alive = drafts.tokens, drafts.counts, drafts.alive
    assert alive is not None
    if appended is not None:
        tokens, counts, alive = _joined(tokens, counts, alive, appended)
    ending = None if stops is None else stops[request_slots]
    counts = _until(tokens, counts, ending)
    width, best = tokens.shape[1], _gain(counts, alive, worth)
    source = torch.zeros_like(counts)
    candidates: list[tuple[int, tuple[Tensor, Tensor, Tensor]]] = []
    if from_host is not None and from_host.alive is not None and at is not None and limits is not None:
        for k in range(at.shape[1]):
            one = (from_host.tokens[:, k], from_host.counts[:, k], from_host.alive[:, k], at[:, k])
            most = limits.clamp(max=width)
            ids, count, chances = _aligned(*one, request_slots, seq_lens, text, most, least)
            candidates.append((k + 1, (ids, _until(ids, count, ending), chances)))
    if copies is not None and copies.alive is not None:
        copied = _until(copies.tokens, copies.counts, ending)
        if candidates:  # the copying arm's own
            _, first_count, first_alive = candidates[0][1]
            copied = copied.masked_fill(_gain(first_count, first_alive, worth) > 0, 0)
        candidates.append((-1, (copies.tokens, copied, copies.alive)))
    for number, (ids, count, chances) in candidates:
        gain = _gain(count, chances, worth)
        wins = (count > 0) & (gain > best)
        ids, chances = (F.pad(t, (0, max(width - t.shape[1], 0)))[:, :width] for t in (ids, chances))
        tokens = torch.where(wins[:, None], ids, tokens)
        alive = torch.where(wins[:, None], chances, alive)
        counts, best = torch.where(wins, count, counts), torch.where(wins, gain, best)
        source = torch.where(wins, number, source)
    wanted = kept = counts.to(torch.int32)
    first = drafts.counts
    if drawn is not None:
        fills = (source == 0) & (first > 0) & (drafts.faults == 0)
        if appended is not None:
            fills &= appended.counts == 0
        filled = torch.maximum(counts, _until(tokens, drawn.clamp(max=width), ending))
        kept, first = torch.where(fills, filled, counts).int(), torch.where(fills, filled, first)
    if most_drafts is not None:
        kept = _likeliest(alive, kept, most_drafts)
    put_block(text, request_slots, seq_lens, tokens)
    return Chosen(
        tokens=tokens,
        widths=kept + 1,
        first_drafts=torch.minimum(kept, first).int(),
        source=source.to(torch.int32),
        wanted=wanted,
    )


def _sound(tokens: Tensor, drafted: Tensor, alive: Tensor, confidences: Tensor) -> Tensor:
    """Return the number of leading valid drafts, [B]: ids that clamping left unchanged, chances that are not NaN."""
    # NaN does not equal itself.
    sound = (tokens == drafted) & (alive == alive)
    columns = min(confidences.shape[1], tokens.shape[1])
    sure = confidences[:, :columns]
    sound[:, :columns] &= sure == sure
    return sound.cumprod(1).sum(1)


def _until(tokens: Tensor, counts: Tensor, ending: Tensor | None) -> Tensor:
    """Return `counts` up to the first of `tokens` [B, W] that is in its row of `ending` [B, S], [B]."""
    if ending is None:
        return counts
    ends = (tokens[:, :, None] == ending[:, None]).any(2)
    column = torch.arange(1, tokens.shape[1] + 1, device=counts.device)
    return torch.minimum(counts, torch.where(ends, column, tokens.shape[1]).amin(1))


def _lay(into: Tensor, index: Tensor, values: Tensor) -> None:
    width = min(values.shape[1], into.shape[1])
    into[:, :width].index_copy_(0, index, values[:, :width])


def put_block(text: Tensor, request_slots: Tensor, seq_lens: Tensor, tokens: Tensor) -> None:
    """Write tokens [B, W] to the text, from position seq_lens[b] + 1 on."""
    column = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    text[request_slots[:, None], seq_lens[:, None] + column] = tokens


def _aligned(
    tokens: Tensor,
    counts: Tensor,
    alive: Tensor,
    at: Tensor,
    request_slots: Tensor,
    seq_lens: Tensor,
    text: Tensor,
    limits: Tensor,
    least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, counts and chances of one candidate per request, without its beginning that is in the text by now
    and without tokens of a chance below `least`. The count is 0 if the text differs from that beginning."""
    columns = tokens.shape[1]
    column = torch.arange(columns, device=seq_lens.device)
    passed = seq_lens + 1 - at
    place = (at[:, None] + column).clamp(0, text.shape[1] - 1)
    same = (text[request_slots[:, None], place] == tokens) | (column >= passed[:, None])
    before = alive.gather(1, (passed - 1).clamp(0, columns - 1)[:, None])
    before = torch.where(passed[:, None] > 0, before, 1.0)
    fits = same.all(1) & (passed >= 0) & (passed < counts) & (before[:, 0] > 0)
    left = torch.where(fits, torch.minimum(counts - passed, limits), 0)
    index = (passed[:, None] + column).clamp(0, columns - 1)
    chances = alive.gather(1, index) / before
    left = ((chances >= least) & (column < left[:, None])).sum(1)
    return tokens.gather(1, index), left, chances


def _joined(tokens: Tensor, counts: Tensor, alive: Tensor, appended: Drafts) -> tuple[Tensor, Tensor, Tensor]:
    """Append `appended` to the drafts of every request."""
    place = torch.arange(tokens.shape[1], device=counts.device) - counts[:, None]
    joins = (place >= 0) & (place < appended.counts[:, None])
    place = place.clamp(0, appended.tokens.shape[1] - 1)
    chances = 0.0 if appended.alive is None else appended.alive.gather(1, place)
    tokens = torch.where(joins, appended.tokens.gather(1, place), tokens)
    return tokens, counts + appended.counts, torch.where(joins, chances, alive)


def _gain(counts: Tensor, alive: Tensor, worth: float) -> Tensor:
    """Return the expected accepted drafts minus ``worth`` for each row, [B]."""
    column = torch.arange(alive.shape[1], device=counts.device)
    return torch.where(column < counts[:, None], alive - worth, 0.0).sum(1)


def _likeliest(alive: Tensor, counts: Tensor, most: int) -> Tensor:
    """Return how many drafts of each request are among the `most` likeliest of the batch, [B] int32."""
    size, width = alive.shape
    if size * width <= most:
        return counts
    column = torch.arange(width, device=counts.device)
    real = torch.where(column < counts[:, None], alive, -1.0)
    # Sorted depth by depth, so that the earlier of two equal chances is kept.
    order = real.T.reshape(-1).argsort(descending=True, stable=True)[:most]
    kept = torch.zeros(width * size, dtype=torch.int32, device=order.device).index_fill_(0, order, 1)
    return torch.minimum(kept.view(width, size).sum(0, dtype=torch.int32), counts)
