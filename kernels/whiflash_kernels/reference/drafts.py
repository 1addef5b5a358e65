"""Cutting, laying and choosing drafts in plain torch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from whiflash_kernels.structs import Chosen, Drafts, HostDrafts


def cut_drafts(
    confidences: Tensor, calibration: Tensor, edges: Tensor, limits: Tensor, worth: float
) -> tuple[Tensor, Tensor]:
    """See `whiflash_kernels.drafts.cut_drafts`."""
    chances = calibration[torch.bucketize(confidences.contiguous(), edges, right=True)]
    alive = chances.cumprod(1)
    kept = (alive[:, 1:] >= worth).sum(1) + 1
    return torch.minimum(kept, limits), alive


def lay_drafts(
    parts: Sequence[tuple[Tensor, Drafts]],
    request_slots: Tensor,
    seq_lens: Tensor,
    width: int,
    confidences: int,
    vocabulary: int,
    text: Tensor | None,
) -> Drafts:
    """See `whiflash_kernels.drafts.lay_drafts`."""
    size, device = len(request_slots), request_slots.device
    tokens = torch.zeros((size, width), dtype=torch.int64, device=device)
    counts = torch.zeros(size, dtype=torch.int64, device=device)
    alive = torch.ones((size, width), device=device)
    sure = torch.zeros((size, confidences), device=device)
    faults = torch.zeros(size, dtype=torch.int32, device=device)
    for members, own in parts:
        _lay(tokens, members, own.tokens)
        counts.index_copy_(0, members, own.counts)
        if own.alive is not None:
            _lay(alive, members, own.alive)
        if own.confidences is not None:
            _lay(sure, members, own.confidences)
    if parts:
        given, proposed = tokens, counts
        tokens = given.clamp(0, vocabulary - 1)
        counts = torch.minimum(proposed.clamp(min=0), _sound(tokens, given, alive, sure))
        faults = (counts != proposed).to(torch.int32)
    if text is not None:
        for members, _ in parts:
            put_block(text, request_slots[members], seq_lens[members], tokens[members])
    return Drafts(tokens, counts, alive, sure, faults)


def _sound(tokens: Tensor, given: Tensor, alive: Tensor, confidences: Tensor) -> Tensor:
    """[B]: how many of the first tokens can be drafts: `given` as they are, with numbers for chances."""
    # NaN is what does not equal itself.
    sound = (tokens == given) & (alive == alive)
    columns = min(confidences.shape[1], tokens.shape[1])
    sure = confidences[:, :columns]
    sound[:, :columns] &= sure == sure
    return sound.cumprod(1).sum(1)


def _lay(into: Tensor, index: Tensor, values: Tensor) -> None:
    width = min(values.shape[1], into.shape[1])
    into[:, :width].index_copy_(0, index, values[:, :width])


def put_block(text: Tensor, request_slots: Tensor, seq_lens: Tensor, tokens: Tensor) -> None:
    """Write tokens [B, W] behind the lengths [B]."""
    column = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    text[request_slots[:, None], seq_lens[:, None] + column] = tokens


def choose_drafts(
    drafts: Drafts,
    request_slots: Tensor,
    seq_lens: Tensor,
    text: Tensor,
    own: Tensor | None,
    appended: Drafts | None,
    from_host: HostDrafts | None,
    copies: Drafts | None,
    rooms: Tensor | None,
    worth: float,
    room: int | None,
) -> Chosen:
    """See `whiflash_kernels.drafts.choose_drafts`."""
    tokens, counts, alive = drafts.tokens, drafts.counts, drafts.alive
    assert alive is not None
    if appended is not None:
        tokens, counts, alive = _joined(tokens, counts, alive, appended)
    width, best = tokens.shape[1], _gain(counts, alive, worth)
    voice = torch.zeros_like(counts)
    others: list[tuple[int, tuple[Tensor, Tensor, Tensor]]] = []
    if from_host is not None and rooms is not None:
        for number in range(from_host.counts.shape[1]):
            one = HostDrafts(*(values[:, number] for values in from_host))
            others.append((number + 1, _aligned(one, request_slots, seq_lens, text, rooms.clamp(max=width))))
    if copies is not None and copies.alive is not None:
        found = copies.counts
        if others:  # the copying arm's own voice
            _, said, lives = others[0][1]
            found = found.masked_fill(_gain(said, lives, worth) > 0, 0)
        others.append((-1, (copies.tokens, found, copies.alive)))
    for number, (theirs, count, lives) in others:
        gain = _gain(count, lives, worth)
        wins = (count > 0) & (gain > best)
        theirs, lives = (F.pad(t, (0, max(width - t.shape[1], 0)))[:, :width] for t in (theirs, lives))
        tokens = torch.where(wins[:, None], theirs, tokens)
        alive = torch.where(wins[:, None], lives, alive)
        counts, best = torch.where(wins, count, counts), torch.where(wins, gain, best)
        voice = torch.where(wins, number, voice)
    wanted = kept = counts.to(torch.int32)
    if room is not None:
        kept = _likeliest(alive, kept, room)
    put_block(text, request_slots, seq_lens, tokens)
    return Chosen(
        tokens=tokens,
        widths=kept + 1,
        own=torch.minimum(kept, drafts.counts if own is None else own).to(torch.int32),
        voice=voice.to(torch.int32),
        wanted=wanted,
    )


def _aligned(
    from_host: HostDrafts, request_slots: Tensor, seq_lens: Tensor, text: Tensor, rooms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, counts and chances of one voice a request behind the text as it is."""
    columns = from_host.tokens.shape[1]
    column = torch.arange(columns, device=seq_lens.device)
    passed = seq_lens + 1 - from_host.at
    place = (from_host.at[:, None] + column).clamp(0, text.shape[1] - 1)
    same = (text[request_slots[:, None], place] == from_host.tokens) | (column >= passed[:, None])
    before = from_host.alive.gather(1, (passed - 1).clamp(0, columns - 1)[:, None])
    before = torch.where(passed[:, None] > 0, before, 1.0)
    fits = same.all(1) & (passed >= 0) & (passed < from_host.counts) & (before[:, 0] > 0)
    counts = torch.where(fits, torch.minimum(from_host.counts - passed, rooms), 0)
    index = (passed[:, None] + column).clamp(0, columns - 1)
    return from_host.tokens.gather(1, index), counts, from_host.alive.gather(1, index) / before


def _joined(tokens: Tensor, counts: Tensor, alive: Tensor, appended: Drafts) -> tuple[Tensor, Tensor, Tensor]:
    """`appended` behind the drafts of every request: it overwrites padding only."""
    width, extra = tokens.shape[1], appended.tokens.shape[1]
    column = counts[:, None] + torch.arange(extra, device=counts.device)
    tokens = F.pad(tokens, (0, extra)).scatter_(1, column, appended.tokens)[:, :width]
    theirs = (
        torch.zeros_like(appended.tokens, dtype=alive.dtype) if appended.alive is None else appended.alive
    )
    alive = F.pad(alive, (0, extra)).scatter_(1, column, theirs)[:, :width]
    return tokens, counts + appended.counts, alive


def _gain(counts: Tensor, alive: Tensor, worth: float) -> Tensor:
    """[B]: accepted drafts that are expected, net of what their rows must bring."""
    column = torch.arange(alive.shape[1], device=counts.device)
    return torch.where(column < counts[:, None], alive - worth, 0.0).sum(1)


def _likeliest(alive: Tensor, counts: Tensor, room: int) -> Tensor:
    """[B]: how many drafts of each request are among the `room` likeliest of the batch."""
    size, width = alive.shape
    if size * width <= room:
        return counts
    column = torch.arange(width, device=counts.device)
    real = torch.where(column < counts[:, None], alive, -1.0)
    # Depth by depth, so that of equals the earlier one stays.
    order = real.T.reshape(-1).argsort(descending=True, stable=True)[:room]
    kept = torch.zeros(width * size, dtype=torch.int32, device=order.device).index_fill_(0, order, 1)
    return torch.minimum(kept.view(width, size).sum(0, dtype=torch.int32), counts)
