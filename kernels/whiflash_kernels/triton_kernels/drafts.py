# ruff: noqa: N803 -- compile-time constants are in capitals, as is usual in Triton
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Cutting, laying and choosing drafts: one program a request."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from whiflash_kernels.structs import Chosen, Drafts, HostDrafts
from whiflash_kernels.triton_kernels.launch import draft_columns, lanes

RIVALS = 128
"""Chances of the batch that a request's own are compared with at a time."""


@triton.jit(do_not_specialize=["width", "row_stride"], do_not_specialize_on_alignment=["calibration"])
def _cut_kernel(
    confidences,
    calibration,
    edges,
    limits,
    counts,
    alive,
    worth,
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
    # In order, so that whatever is compared with `worth` is what torch would compare.
    running = tl.sum(tl.where(column == 0, chance, 0.0), axis=0)
    lives = tl.where(column == 0, running, 0.0)
    for depth in tl.static_range(1, COLUMNS):
        running *= tl.sum(tl.where(column == depth, chance, 0.0), axis=0)
        lives = tl.where(column == depth, running, lives)
    kept = 1 + tl.sum((inside & (column > 0) & (lives >= worth)).to(tl.int64), axis=0)
    tl.store(counts + member, tl.minimum(kept, tl.load(limits + member).to(tl.int64)))
    tl.store(alive + member * width + column, lives, mask=inside)


def cut_drafts(
    confidences: Tensor, calibration: Tensor, edges: Tensor, limits: Tensor, *, worth: float
) -> tuple[Tensor, Tensor]:
    """See `whiflash_kernels.drafts.cut_drafts`."""
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
            float(worth),
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
        "own_width",
        "own_columns",
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
    own_width,
    own_columns,
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
    own = (owner == request).to(tl.int32)
    drafts = tl.sum(own, axis=0) > 0
    row = tl.sum(own * member, axis=0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    known = drafts & (column < own_width)
    if FIRST or drafts:
        given = tl.load(tokens + row * tokens_row + column, mask=known, other=0)
        token = tl.minimum(tl.maximum(given, 0), vocabulary - 1)
        tl.store(out_tokens + request * width + column, token, mask=column < width)
        chance = tl.full([COLUMNS], 1.0, tl.float32)
        if HAS_ALIVE:
            chance = tl.load(alive + row * alive_row + column, mask=known, other=1.0)
        tl.store(out_alive + request * width + column, chance, mask=column < width)
        sure = tl.zeros([COLUMNS], tl.float32)
        if HAS_CONFIDENCES:
            judged = drafts & (column < own_columns) & (column < columns)
            sure = tl.load(confidences + row * confidences_row + column, mask=judged, other=0.0)
        tl.store(out_confidences + request * columns + column, sure, mask=column < columns)
        # NaN is what does not equal itself.
        sound = (token == given) & (chance == chance) & (sure == sure)
        first = tl.min(tl.where(sound & (column < width), width, tl.minimum(column, width)), axis=0)
        said = tl.load(counts + row, mask=drafts, other=0)
        count = tl.minimum(tl.maximum(said, 0), first)
        tl.store(out_counts + request, count)
        tl.store(out_faults + request, (count != said).to(tl.int32))
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
    """See `whiflash_kernels.drafts.lay_drafts`."""
    size, device = request_slots.shape[0], request_slots.device
    make = torch.empty if parts else torch.zeros
    found = (
        make(size, width, dtype=torch.int64, device=device),
        make(size, dtype=torch.int64, device=device),
        make(size, width, dtype=torch.float32, device=device),
        make(size, confidences, dtype=torch.float32, device=device),
        make(size, dtype=torch.int32, device=device),
    )
    if not size:
        return Drafts(*found)
    slots, lengths = request_slots.contiguous(), seq_lens.contiguous()
    for i, (members, own) in enumerate(parts):
        tokens, alive, sure = (_rows(t) for t in (own.tokens, own.alive, own.confidences))
        assert tokens is not None
        # Without them any pointer will do: the kernel does not read it.
        _lay_kernel[(size,)](
            members.contiguous(),
            tokens,
            own.counts.contiguous(),
            found[2] if alive is None else alive,
            found[3] if sure is None else sure,
            slots,
            lengths,
            tokens if text is None else text,
            *found,
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
    return Drafts(*found)


def _rows(values: Tensor | None) -> Tensor | None:
    return values if values is None or values.stride(1) == 1 else values.contiguous()


@triton.jit(do_not_specialize=["width", "host_width", "copies_width", "more_row", "more_alive_row"])
def _merge_drafts_kernel(
    tokens,
    counts,
    own_counts,
    alive,
    more_tokens,
    more_counts,
    more_alive,
    host_tokens,
    host_alive,
    host_counts,
    host_at,
    rooms,
    copies,
    copies_alive,
    copies_counts,
    request_slots,
    seq_lens,
    text,
    out,
    widths,
    own,
    voice,
    wanted,
    chances,
    worth,
    width,
    host_width,
    copies_width,
    more_row,
    more_alive_row,
    text_row,
    COLUMNS: tl.constexpr,
    HOST_COLUMNS: tl.constexpr,
    VOICES: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_MORE_ALIVE: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    COMPETE: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    count = tl.load(counts + request)
    laid = tl.load(own_counts + request)
    token = tl.load(tokens + request * width + column, mask=inside, other=0)
    chance = tl.load(alive + request * width + column, mask=inside, other=0.0)
    if HAS_MORE:
        extra = tl.load(more_counts + request)
        joins = inside & (column >= count) & (column < count + extra)
        place = column - count
        token = tl.where(joins, tl.load(more_tokens + request * more_row + place, mask=joins, other=0), token)
        their = tl.zeros([COLUMNS], tl.float32)
        if HAS_MORE_ALIVE:
            their = tl.load(more_alive + request * more_alive_row + place, mask=joins, other=0.0)
        chance = tl.where(joins, their, chance)
        count += extra
    length = tl.load(seq_lens + request).to(tl.int64)
    line = text + tl.load(request_slots + request).to(tl.int64) * text_row
    best = tl.sum(tl.where(inside & (column < count), chance - worth, 0.0), axis=0)
    whose = 0
    heard = count < 0
    for number in tl.static_range(VOICES):
        row = request * VOICES + number
        found = tl.load(host_counts + row)
        begin = tl.load(host_at + row)
        passed = length + 1 - begin
        place = tl.arange(0, HOST_COLUMNS)
        written = (place < passed) & (place < host_width) & (passed < found)
        known = tl.load(line + begin + place, mask=written, other=0)
        said = tl.load(host_tokens + row * host_width + place, mask=written, other=0)
        fits = (passed >= 0) & (passed < found)
        fits &= tl.sum((written & (known != said)).to(tl.int32), axis=0) == 0
        first = row * host_width + tl.where(fits, passed, 0)
        sure = tl.load(host_alive + first - 1, mask=fits & (passed > 0), other=1.0)
        most = tl.minimum(found - passed, tl.minimum(tl.load(rooms + request), width))
        most = tl.where(fits & (sure > 0.0), most, 0)
        there = inside & (column < most)
        lives = tl.div_rn(tl.load(host_alive + first + column, mask=there, other=0.0), sure)
        gain = tl.sum(tl.where(there, lives - worth, 0.0), axis=0)
        if number == 0:
            heard = gain > 0.0
        wins = (most > 0) & (gain > best)
        theirs = tl.load(host_tokens + first + column, mask=there, other=0)
        token = tl.where(wins, theirs, token)
        chance = tl.where(wins, lives, chance)
        count = tl.where(wins, most, count)
        best = tl.where(wins, gain, best)
        whose = tl.where(wins, number + 1, whose)
    if HAS_COPIES:
        found = tl.load(copies_counts + request)
        there = inside & (column < found) & (column < copies_width)
        lives = tl.load(copies_alive + request * copies_width + column, mask=there, other=0.0)
        gain = tl.sum(tl.where(there, lives - worth, 0.0), axis=0)
        wins = (found > 0) & (heard == 0) & (gain > best)
        theirs = tl.load(copies + request * copies_width + column, mask=there, other=0)
        token = tl.where(wins, theirs, token)
        chance = tl.where(wins, lives, chance)
        count = tl.where(wins, found, count)
        whose = tl.where(wins, -1, whose)
    tl.store(voice + request, whose)
    tl.store(out + request * width + column, token, mask=inside)
    tl.store(line + length + 1 + column, token, mask=inside)
    tl.store(widths + request, (count + 1).to(tl.int32))
    tl.store(own + request, tl.minimum(count, laid).to(tl.int32))
    tl.store(wanted + request, count.to(tl.int32))
    if COMPETE:
        tl.store(chances + request * width + column, tl.where(column < count, chance, -1.0), mask=inside)


@triton.jit(do_not_specialize=["requests", "width", "room"])
def _compete_kernel(chances, widths, own, requests, width, room, COLUMNS: tl.constexpr, RIVALS: tl.constexpr):
    request = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    mine = tl.load(chances + request.to(tl.int64) * width + column, mask=column < width, other=-1.0)
    order = column * requests + request
    ahead = tl.zeros([COLUMNS], tl.int32)
    for begin in range(0, requests * width, RIVALS):
        rival = begin + tl.arange(0, RIVALS)
        theirs = tl.load(chances + rival, mask=rival < requests * width, other=-2.0)
        their_order = rival % width * requests + rival // width
        earlier = (theirs[None, :] == mine[:, None]) & (their_order[None, :] < order[:, None])
        ahead += tl.sum(((theirs[None, :] > mine[:, None]) | earlier).to(tl.int32), axis=1)
    kept = tl.sum(((mine >= 0.0) & (ahead < room)).to(tl.int32), axis=0)
    tl.store(widths + request, kept + 1)
    tl.store(own + request, tl.minimum(tl.load(own + request), kept))


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
    """See `whiflash_kernels.drafts.choose_drafts`."""
    (size, width), device = drafts.tokens.shape, text.device
    assert drafts.alive is not None
    chosen = Chosen(
        torch.empty(size, width, dtype=torch.int64, device=device),
        *(torch.empty(size, dtype=torch.int32, device=device) for _ in range(4)),
    )
    if not size:
        return chosen
    # What was joined may be a part of wider rows.
    tokens, counts, alive = (t.contiguous() for t in (drafts.tokens, drafts.counts, drafts.alive))
    compete = room is not None and room < size * width
    chances = torch.empty(size, width, dtype=torch.float32, device=device) if compete else alive
    columns = draft_columns(width)
    # Without them any pointer will do: the kernel does not read it.
    heard = HostDrafts(tokens, alive, counts, counts) if from_host is None else from_host
    copied = (tokens, alive, counts)
    if copies is not None:
        assert copies.alive is not None
        copied = copies.tokens, copies.alive, copies.counts
    more_tokens, more_alive = (
        (None, None) if appended is None else (_rows(appended.tokens), _rows(appended.alive))
    )
    _merge_drafts_kernel[(size,)](
        tokens,
        counts,
        counts if own is None else own.contiguous(),
        alive,
        tokens if more_tokens is None else more_tokens,
        counts if appended is None else appended.counts.contiguous(),
        alive if more_alive is None else more_alive,
        *heard,
        counts if rooms is None else rooms.contiguous(),
        *copied,
        request_slots.contiguous(),
        seq_lens.contiguous(),
        text,
        *chosen,
        chances,
        float(worth),
        width,
        heard.tokens.shape[-1],
        copied[0].shape[1],
        0 if more_tokens is None else more_tokens.stride(0),
        0 if more_alive is None else more_alive.stride(0),
        text.stride(0),
        COLUMNS=columns,
        HOST_COLUMNS=1 if from_host is None else draft_columns(heard.tokens.shape[2]),
        VOICES=0 if from_host is None else heard.counts.shape[1],
        HAS_MORE=appended is not None,
        HAS_MORE_ALIVE=more_alive is not None,
        HAS_COPIES=copies is not None,
        COMPETE=compete,
        num_warps=1,
    )
    if compete:
        _compete_kernel[(size,)](
            chances,
            chosen.widths,
            chosen.own,
            size,
            width,
            room,
            COLUMNS=columns,
            RIVALS=RIVALS,
            num_warps=4,
        )
    return chosen
