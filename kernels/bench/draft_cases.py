"""What is measured of the ops between drafting and verification: small, so a launch is their floor."""

from collections.abc import Iterator
from functools import partial

import torch
from cases import BATCHES, CONTEXT, Bench, Case
from whiflash_kernels import (
    Drafts,
    choose_drafts,
    claim_backlogs,
    cut_drafts,
    draft_inputs,
    lay_drafts,
    pass_rows,
    propose_copies,
)

COPIED = 24
"""Tokens of a copy."""

BINS = 11


def pass_cases(bench: Bench) -> Iterator[Case]:
    """What a round reads before its drafts: backlogs of two drafters, a chain's inputs, a block's rows."""
    s = bench.shape
    width = len(s.eagle3_chunks) * s.hidden * bench.rings.features.element_size()
    for batch in BATCHES:
        slots, lengths = bench.request_slots(batch), bench.below(CONTEXT - s.block, batch) + 1
        marks = torch.zeros(2, bench.slots, dtype=torch.int64, device=bench.device)
        due = torch.ones(2, batch, dtype=torch.int64, device=bench.device)
        yield Case(
            "claim_backlogs",
            f"2 drafters, {batch} requests",
            partial(claim_backlogs, marks, slots, lengths, due),
            8 * (2 * batch + 5 * 2 * batch),
        )
        members, bonus = torch.arange(batch, device=bench.device), bench.below(s.vocab, batch)
        chunks = {"chunks": s.eagle3_chunks, "chunk_width": s.hidden}
        yield Case(
            "draft_inputs",
            f"{batch} requests",
            partial(draft_inputs, bench.rings, members, slots, lengths, bonus, bonus, **chunks),
            batch * (9 * 8 + 2 * width),
        )
        yield Case(
            "pass_rows",
            f"{batch} x {s.block} rows",
            partial(pass_rows, bench.table, slots, lengths, bonus, offset=0, width=s.block, fill=0),
            batch * (3 * 8 + s.block * (4 + 3 * 8)),
        )


def draft_cases(bench: Bench) -> Iterator[Case]:
    """Half of a batch drafted by a chain of 7, half by a block; copies behind them, and in their place."""
    s = bench.shape
    edges = torch.linspace(0.1, 0.97, BINS - 1, device=bench.device)
    calibration = torch.linspace(0.05, 0.99, BINS + 1, device=bench.device)
    for batch in BATCHES:
        slots, lengths = bench.request_slots(batch), bench.below(CONTEXT - 2 * COPIED, batch)
        order = torch.randperm(batch, device=bench.device, generator=bench.generator)
        parts = []
        for members, width in ((order[: batch // 2], 7), (order[batch // 2 :], s.block - 1)):
            sure = torch.rand(len(members), width, device=bench.device, generator=bench.generator)
            limits = torch.full_like(members, width)
            call = partial(cut_drafts, sure, calibration, edges, limits, worth=0.1)
            if width == s.block - 1:
                yield Case(
                    "cut_drafts", f"{len(members)} x {width}", call, 8 * sure.numel() + 16 * len(members)
                )
            counts, alive = call()
            tokens = bench.below(s.vocab, len(members), width)
            parts.append((members, Drafts(tokens, counts, alive, sure)))
        lay = partial(
            lay_drafts,
            [part for part in parts if len(part[0])],
            slots,
            lengths,
            width=COPIED,
            confidences=s.block - 1,
            vocabulary=s.vocab,
            text=bench.text,
        )
        read = sum(16 * own.tokens.numel() + 16 * len(members) for members, own in parts)
        yield Case("lay_drafts", f"{batch} requests", lay, read + batch * (8 + 20 * COPIED + 4 * s.block))
        chances = torch.rand(batch, COPIED, device=bench.device, generator=bench.generator).cumprod(1)
        copies = Drafts(
            bench.below(s.vocab, batch, COPIED), torch.full((batch,), 4, device=bench.device), chances
        )
        choose = partial(
            choose_drafts,
            lay(),
            slots,
            lengths,
            bench.text,
            appended=copies,
            copies=copies,
            worth=0.1,
            room=4 * batch,
        )
        # The batch's drafts, those behind and the copies; tokens out twice, chances out and in.
        moved = batch * COPIED * (3 * 12 + 2 * 8 + 2 * 4)
        yield Case("choose_drafts", f"{batch} requests", choose, moved)


def copy_cases(bench: Bench) -> Iterator[Case]:
    """Texts that hold nothing to copy: each is walked to its beginning."""
    texts = torch.arange(bench.slots * CONTEXT, device=bench.device).view(bench.slots, CONTEXT)
    boundaries = torch.tensor([1, 2, 3, 4, 6, 9, 14, 22], dtype=torch.int32, device=bench.device)
    back = torch.zeros(bench.slots, dtype=torch.int64, device=bench.device)
    for batch in BATCHES:
        lengths = torch.full((batch,), CONTEXT - 1, device=bench.device)
        limits = torch.full_like(lengths, COPIED)
        ones = torch.ones(batch, device=bench.device)
        chances = torch.full((batch, 8, 4), 0.5, device=bench.device)
        arguments = (texts, bench.request_slots(batch), lengths, back, limits, ones, chances, boundaries)
        call = partial(propose_copies, *arguments, width=COPIED, worth=0.1)
        yield Case("propose_copies", f"{batch} x {CONTEXT} tokens", call, 8 * batch * CONTEXT)
