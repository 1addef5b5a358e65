# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Kernels that cut drafts, put them side by side and choose among them: one program per request."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import Chosen, Drafts
from whiflash_kernels.triton_kernels.launch import draft_columns, lanes, power_of_two

RIVALS = 128
"""Number of the batch's chances with which a request's own are compared at a time."""


@triton.jit(do_not_specialize=["bins", "width", "row_stride"], do_not_specialize_on_alignment=["calibration"])
def _cut_kernel(
    confidences,
    calibration,
    edges,
    limits,
    counts,
    alive,
    bins,
    width,
    row_stride,
    EDGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    member = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    sure = tl.load(confidences + member * row_stride + column, mask=inside, other=0.0)
    place = tl.zeros([COLUMNS], tl.int32)
    for i in tl.static_range(EDGES):
        place += (tl.load(edges + i) <= sure).to(tl.int32)
    chance = tl.load(calibration + place, mask=inside, other=0.0)
    worth = tl.load(calibration + bins - 1)
    # In order, so that whatever is compared with `worth` is what torch would compare.
    running = tl.sum(tl.where(column == 0, chance, 0.0), axis=0)
    lives = tl.where(column == 0, running, 0.0)
    for depth in tl.static_range(1, COLUMNS):
        running *= tl.sum(tl.where(column == depth, chance, 0.0), axis=0)
        lives = tl.where(column == depth, running, lives)
    kept = 1 + tl.sum((inside & (column > 0) & (lives >= worth)).to(tl.int64), axis=0)
    tl.store(counts + member, tl.minimum(kept, tl.load(limits + member).to(tl.int64)))
    tl.store(alive + member * width + column, lives, mask=inside)


def cut_drafts(confidences: Tensor, calibration: Tensor, edges: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Count each request's drafts that are worth their rows; see `whiflash_kernels.drafts.cut_drafts`."""
    members, width = confidences.shape
    counts = torch.empty(members, dtype=torch.int64, device=confidences.device)
    alive = torch.empty(members, width, dtype=torch.float32, device=confidences.device)
    confidences = confidences if confidences.stride(1) == 1 else confidences.contiguous()
    if members:
        _cut_kernel[(members,)](
            confidences,
            calibration.contiguous(),
            edges.contiguous(),
            limits.contiguous(),
            counts,
            alive,
            calibration.shape[0],
            width,
            confidences.stride(0),
            EDGES=edges.shape[0],
            COLUMNS=draft_columns(width),
            num_warps=1,
        )
    return counts, alive


@triton.jit(
    do_not_specialize=[
        "members",
        "width",
        "columns",
        "vocabulary",
        "part_width",
        "part_columns",
        "tokens_row",
        "alive_row",
        "confidences_row",
    ]
)
def _lay_kernel(
    index,
    tokens,
    counts,
    alive,
    confidences,
    request_slots,
    seq_lens,
    text,
    out_tokens,
    out_counts,
    out_alive,
    out_confidences,
    out_faults,
    members,
    width,
    columns,
    vocabulary,
    part_width,
    part_columns,
    tokens_row,
    alive_row,
    confidences_row,
    text_row,
    MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    HAS_CONFIDENCES: tl.constexpr,
    HAS_TEXT: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    member = tl.arange(0, MEMBERS)
    owner = tl.load(index + member, mask=member < members, other=-1)
    here = (owner == request).to(tl.int32)
    drafts = tl.sum(here, axis=0) > 0
    row = tl.sum(here * member, axis=0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    known = drafts & (column < part_width)
    if FIRST or drafts:
        drafted = tl.load(tokens + row * tokens_row + column, mask=known, other=0)
        token = tl.minimum(tl.maximum(drafted, 0), vocabulary - 1)
        tl.store(out_tokens + request * width + column, token, mask=column < width)
        chance = tl.full([COLUMNS], 1.0, tl.float32)
        if HAS_ALIVE:
            chance = tl.load(alive + row * alive_row + column, mask=known, other=1.0)
        tl.store(out_alive + request * width + column, chance, mask=column < width)
        sure = tl.zeros([COLUMNS], tl.float32)
        if HAS_CONFIDENCES:
            judged = drafts & (column < part_columns) & (column < columns)
            sure = tl.load(confidences + row * confidences_row + column, mask=judged, other=0.0)
        tl.store(out_confidences + request * columns + column, sure, mask=column < columns)
        # NaN does not equal itself.
        sound = (token == drafted) & (chance == chance) & (sure == sure)
        first = tl.min(tl.where(sound & (column < width), width, tl.minimum(column, width)), axis=0)
        proposed = tl.load(counts + row, mask=drafts, other=0)
        count = tl.minimum(tl.maximum(proposed, 0), first)
        tl.store(out_counts + request, count)
        tl.store(out_faults + request, (count != proposed).to(tl.int32))
        if HAS_TEXT:
            begin = tl.load(request_slots + request).to(tl.int64) * text_row
            begin += tl.load(seq_lens + request).to(tl.int64) + 1
            tl.store(text + begin + column, token, mask=drafts & (column < width))


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
    """Put the drafts of several drafters in the rows of one batch. See `whiflash_kernels.drafts.lay_drafts`."""
    size, device = request_slots.shape[0], request_slots.device
    make = torch.empty if parts else torch.zeros
    laid = (
        make(size, width, dtype=torch.int64, device=device),
        make(size, dtype=torch.int64, device=device),
        make(size, width, dtype=torch.float32, device=device),
        make(size, confidences, dtype=torch.float32, device=device),
        make(size, dtype=torch.int32, device=device),
    )
    if not size:
        return Drafts(*laid)
    slots, lengths = request_slots.contiguous(), seq_lens.contiguous()
    for i, (members, part) in enumerate(parts):
        tokens, alive, sure = (_rows(t) for t in (part.tokens, part.alive, part.confidences))
        assert tokens is not None
        # Without them any pointer will do: the kernel does not read it.
        _lay_kernel[(size,)](
            members.contiguous(),
            tokens,
            part.counts.contiguous(),
            laid[2] if alive is None else alive,
            laid[3] if sure is None else sure,
            slots,
            lengths,
            tokens if text is None else text,
            *laid,
            members.shape[0],
            width,
            confidences,
            vocabulary,
            tokens.shape[1],
            0 if sure is None else sure.shape[1],
            tokens.stride(0),
            0 if alive is None else alive.stride(0),
            0 if sure is None else sure.stride(0),
            0 if text is None else text.stride(0),
            MEMBERS=lanes(members.shape[0]),
            COLUMNS=draft_columns(max(width, confidences)),
            FIRST=i == 0,
            HAS_ALIVE=alive is not None,
            HAS_CONFIDENCES=sure is not None,
            HAS_TEXT=text is not None,
            num_warps=1,
        )
    return Drafts(*laid)


def _rows(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.stride(1) == 1 else values.contiguous()


@triton.jit
def _until(token, column, count, stop):
    """Cut `count` after the first token that is among `stop`."""
    ends = tl.sum((token[:, None] == stop[None, :]).to(tl.int32), axis=1) > 0
    return tl.minimum(count, tl.min(tl.where(ends, column + 1, 2147483647), axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["width", "host_width", "copies_width", "more_row", "more_alive_row"])
def _merge_drafts_kernel(
    tokens,
    counts,
    alive,
    more_tokens,
    more_counts,
    more_alive,
    host_tokens,
    host_counts,
    host_alive,
    host_at,
    limits,
    copies,
    copies_alive,
    copies_counts,
    drawn,
    faults,
    request_slots,
    seq_lens,
    text,
    stops,
    out,
    widths,
    first_drafts,
    source,
    wanted,
    chances,
    worth,
    least,
    width,
    host_width,
    copies_width,
    more_row,
    more_alive_row,
    text_row,
    COLUMNS: tl.constexpr,
    HOST_COLUMNS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_MORE_ALIVE: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    HAS_DRAWN: tl.constexpr,
    COMPETE: tl.constexpr,
    STOPS: tl.constexpr,
    PADDED_STOPS: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    count = tl.load(counts + request)
    first_count = count
    alone = count > 0
    token = tl.load(tokens + request * width + column, mask=inside, other=0)
    chance = tl.load(alive + request * width + column, mask=inside, other=0.0)
    if HAS_MORE:
        extra = tl.load(more_counts + request)
        joins = inside & (column >= count) & (column < count + extra)
        place = column - count
        token = tl.where(joins, tl.load(more_tokens + request * more_row + place, mask=joins, other=0), token)
        more_chance = tl.zeros([COLUMNS], tl.float32)
        if HAS_MORE_ALIVE:
            more_chance = tl.load(more_alive + request * more_alive_row + place, mask=joins, other=0.0)
        chance = tl.where(joins, more_chance, chance)
        count += extra
        alone &= extra == 0
    length = tl.load(seq_lens + request).to(tl.int64)
    slot = tl.load(request_slots + request).to(tl.int64)
    line = text + slot * text_row
    if STOPS:
        each = tl.arange(0, PADDED_STOPS)
        stop = tl.load(stops + slot * STOPS + each, mask=each < STOPS, other=-1)
        count = _until(token, column, count, stop)
    best = tl.sum(tl.where(inside & (column < count), chance - worth, 0.0), axis=0)
    winner = 0
    first_pays = count < 0
    for number in tl.static_range(CANDIDATES):
        row = request * CANDIDATES + number
        proposed = tl.load(host_counts + row)
        begin = tl.load(host_at + row)
        passed = length + 1 - begin
        place = tl.arange(0, HOST_COLUMNS)
        written = (place < passed) & (place < host_width) & (passed < proposed)
        committed = tl.load(line + begin + place, mask=written, other=0)
        expected = tl.load(host_tokens + row * host_width + place, mask=written, other=0)
        fits = (passed >= 0) & (passed < proposed)
        fits &= tl.sum((written & (committed != expected)).to(tl.int32), axis=0) == 0
        first = row * host_width + tl.where(fits, passed, 0)
        sure = tl.load(host_alive + first - 1, mask=fits & (passed > 0), other=1.0)
        most = tl.minimum(proposed - passed, tl.minimum(tl.load(limits + request), width))
        most = tl.where(fits & (sure > 0.0), most, 0)
        there = inside & (column < most)
        lives = tl.div_rn(tl.load(host_alive + first + column, mask=there, other=0.0), sure)
        there &= lives >= least
        candidate = tl.load(host_tokens + first + column, mask=there, other=0)
        most = tl.sum(there.to(tl.int64), axis=0)
        if STOPS:
            most = _until(candidate, column, most, stop)
            there &= column < most
        gain = tl.sum(tl.where(there, lives - worth, 0.0), axis=0)
        if number == 0:
            first_pays = gain > 0.0
        wins = (most > 0) & (gain > best)
        token = tl.where(wins, candidate, token)
        chance = tl.where(wins, lives, chance)
        count = tl.where(wins, most, count)
        best = tl.where(wins, gain, best)
        winner = tl.where(wins, number + 1, winner)
    if HAS_COPIES:
        copied = tl.load(copies_counts + request)
        there = inside & (column < copied) & (column < copies_width)
        copy = tl.load(copies + request * copies_width + column, mask=there, other=0)
        if STOPS:
            copied = _until(copy, column, copied, stop)
            there &= column < copied
        lives = tl.load(copies_alive + request * copies_width + column, mask=there, other=0.0)
        gain = tl.sum(tl.where(there, lives - worth, 0.0), axis=0)
        wins = (copied > 0) & (first_pays == 0) & (gain > best)
        token = tl.where(wins, copy, token)
        chance = tl.where(wins, lives, chance)
        count = tl.where(wins, copied, count)
        winner = tl.where(wins, -1, winner)
    tl.store(source + request, winner)
    tl.store(out + request * width + column, token, mask=inside)
    tl.store(line + length + 1 + column, token, mask=inside)
    tl.store(wanted + request, count.to(tl.int32))
    if HAS_DRAWN:
        fills = alone & (winner == 0) & (tl.load(faults + request) == 0)
        filled = tl.minimum(tl.load(drawn + request), width).to(tl.int64)
        if STOPS:
            filled = _until(token, column, filled, stop)
        count = tl.where(fills, tl.maximum(count, filled), count)
        first_count = tl.where(fills, count, first_count)
    tl.store(widths + request, (count + 1).to(tl.int32))
    tl.store(first_drafts + request, tl.minimum(count, first_count).to(tl.int32))
    if COMPETE:
        tl.store(chances + request * width + column, tl.where(column < count, chance, -1.0), mask=inside)


@triton.jit(do_not_specialize=["requests", "width", "most_drafts"])
def _compete_kernel(
    chances, widths, first_drafts, requests, width, most_drafts, COLUMNS: tl.constexpr, RIVALS: tl.constexpr
):
    request = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    mine = tl.load(chances + request.to(tl.int64) * width + column, mask=column < width, other=-1.0)
    order = column * requests + request
    ahead = tl.zeros([COLUMNS], tl.int32)
    for begin in range(0, requests * width, RIVALS):
        rival = begin + tl.arange(0, RIVALS)
        other = tl.load(chances + rival, mask=rival < requests * width, other=-2.0)
        rival_order = rival % width * requests + rival // width
        earlier = (other[None, :] == mine[:, None]) & (rival_order[None, :] < order[:, None])
        ahead += tl.sum(((other[None, :] > mine[:, None]) | earlier).to(tl.int32), axis=1)
    kept = tl.sum(((mine >= 0.0) & (ahead < most_drafts)).to(tl.int32), axis=0)
    tl.store(widths + request, kept + 1)
    tl.store(first_drafts + request, tl.minimum(tl.load(first_drafts + request), kept))


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
    """Choose the drafts that are verified; see `whiflash_kernels.drafts.choose_drafts`."""
    (size, width), device = drafts.tokens.shape, text.device
    assert drafts.alive is not None
    chosen = Chosen(
        torch.empty(size, width, dtype=torch.int64, device=device),
        *(torch.empty(size, dtype=torch.int32, device=device) for _ in range(4)),
    )
    if not size:
        return chosen
    # The drafts may be a slice of wider rows; the kernel reads contiguous ones.
    tokens, counts, alive = (t.contiguous() for t in (drafts.tokens, drafts.counts, drafts.alive))
    compete = most_drafts is not None and most_drafts < size * width
    chances = torch.empty(size, width, dtype=torch.float32, device=device) if compete else alive
    columns = draft_columns(width)
    # Without them any pointer will do: the kernel does not read it.
    candidates = (tokens, counts, alive, counts)
    if from_host is not None:
        assert from_host.alive is not None
        assert at is not None
        candidates = from_host.tokens, from_host.counts, from_host.alive, at
    copied = (tokens, alive, counts)
    if copies is not None:
        assert copies.alive is not None
        copied = copies.tokens, copies.alive, copies.counts
    more_tokens, more_alive = (None, None) if appended is None else (_rows(appended.tokens), _rows(appended.alive))
    _merge_drafts_kernel[(size,)](
        tokens,
        counts,
        alive,
        tokens if more_tokens is None else more_tokens,
        counts if appended is None else appended.counts.contiguous(),
        alive if more_alive is None else more_alive,
        *candidates,
        counts if limits is None else limits.contiguous(),
        *copied,
        counts if drawn is None else drawn.contiguous(),
        counts if drafts.faults is None else drafts.faults,
        request_slots.contiguous(),
        seq_lens.contiguous(),
        text,
        text if stops is None else stops,
        *chosen,
        chances,
        float(worth),
        float(least),
        width,
        candidates[0].shape[-1],
        copied[0].shape[1],
        0 if more_tokens is None else more_tokens.stride(0),
        0 if more_alive is None else more_alive.stride(0),
        text.stride(0),
        COLUMNS=columns,
        HOST_COLUMNS=1 if from_host is None else draft_columns(from_host.tokens.shape[2]),
        CANDIDATES=0 if from_host is None else from_host.counts.shape[1],
        HAS_MORE=appended is not None,
        HAS_MORE_ALIVE=more_alive is not None,
        HAS_COPIES=copies is not None,
        HAS_DRAWN=drawn is not None,
        COMPETE=compete,
        STOPS=0 if stops is None else stops.shape[1],
        PADDED_STOPS=1 if stops is None else power_of_two(stops.shape[1]),
        num_warps=1,
    )
    if compete:
        _compete_kernel[(size,)](
            chances,
            chosen.widths,
            chosen.first_drafts,
            size,
            width,
            most_drafts,
            COLUMNS=columns,
            RIVALS=RIVALS,
            num_warps=4,
        )
    return chosen
