"""Measured cases: every op at a model's shapes, with the bytes and operations it cannot do without."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
import whiflash_kernels as ops
from measure import Call
from shapes import ModelShape
from whiflash_kernels.layers import rms_norm, silu_and_mul
from whiflash_kernels.reference import attention

CAPACITY = 64
COPIED = 24
"""Tokens of a copy."""
BINS = 11


@dataclass(frozen=True)
class Case:
    """One op at one size. ``call`` goes through the public op, so either implementation can be forced."""

    op: str
    label: str
    call: Call
    moved_bytes: int
    """Each input read once, each output written once."""
    flops: int = 0
    others: dict[str, Call] = field(default_factory=dict)
    """Other people's implementations, by name."""
    compilable: Call | None = None
    """The reference for torch.compile, where the op hides it behind an operator of torch; None: ``call``."""


@dataclass(frozen=True)
class CaseSizes:
    """Sizes to measure: requests of a batch, parked rows, ingested rows; and the positions of a request."""

    batches: tuple[int, ...] = (1, 8, 32)
    backlogs: tuple[int, ...] = (1, 16, 64)
    rows: tuple[int, ...] = (1, 16, 64, 512)
    context: int = 2048
    long: tuple[int, ...] = ()
    """Further context lengths at which verifications are measured."""


class Bench:
    """Random tensors of one model on one device; on the device `meta` they have no numbers."""

    def __init__(
        self, shape: ModelShape, device: torch.device, largest_batch: int, sizes: CaseSizes = CaseSizes()
    ) -> None:
        self.shape, self.device, self.slots, self.sizes = shape, device, largest_batch + 1, sizes
        self.generator = None if device.type == "meta" else torch.Generator(device=device).manual_seed(0)
        self.table = self.order(self.slots * sizes.context).view(self.slots, sizes.context).int()
        self.rings = ops.BacklogRings(
            self.random(self.slots, CAPACITY, shape.captured * shape.hidden),
            self.below(shape.vocab, self.slots, CAPACITY),
        )
        self.text = torch.zeros(self.slots, sizes.context, dtype=torch.int64, device=device)
        self.rope = self.chances(sizes.context, shape.dim) * 2 - 1

    def random(self, *size: int) -> torch.Tensor:
        scale = size[-1] ** -0.5 if len(size) > 1 else 1.0
        values = torch.randn(size, device=self.device, generator=self.generator, dtype=self.shape.dtype)
        return values.mul_(scale)

    def chances(self, *size: int) -> torch.Tensor:
        return torch.rand(size, device=self.device, generator=self.generator)

    def order(self, count: int) -> torch.Tensor:
        return torch.randperm(count, device=self.device, generator=self.generator)

    def below(self, limit: int, *size: int) -> torch.Tensor:
        return torch.randint(0, limit, size, device=self.device, generator=self.generator)

    def pools(self, layers: int) -> ops.KVPools:
        size = (self.slots * self.sizes.context, self.shape.kv_heads, self.shape.dim)
        return ops.KVPools(
            tuple(self.random(*size) for _ in range(layers)), tuple(self.random(*size) for _ in range(layers))
        )

    def request_slots(self, batch: int) -> torch.Tensor:
        return self.order(self.slots)[:batch]

    def dflash_weights(self) -> ops.DFlashWeights:
        s = self.shape
        return ops.DFlashWeights(
            fc=self.random(s.hidden, len(s.dflash_chunks) * s.hidden),
            hidden_norm=self.random(s.hidden),
            kv=self.random(s.dflash_layers * 2 * s.kv_heads * s.dim, s.hidden),
            k_norm=self.random(s.dflash_layers, s.dim),
            eps=1e-6,
        )

    def eagle3_weights(self) -> ops.Eagle3Weights:
        s = self.shape
        return ops.Eagle3Weights(
            fc=self.random(s.hidden, len(s.eagle3_chunks) * s.hidden),
            embedding=self.random(s.vocab, s.hidden),
            input_norm=self.random(s.hidden),
            hidden_norm=self.random(s.hidden),
            kv=self.random(2 * s.kv_heads * s.dim, 2 * s.hidden),
            eps=1e-6,
        )


def routing_cases(bench: Bench, fill: int | None = None) -> Iterator[Case]:
    for rows in (*bench.sizes.batches, *([] if fill is None else [fill])):
        logits = bench.random(rows, bench.shape.vocab).mul_(bench.shape.vocab**0.5 * 3)
        label = f"{rows} x {bench.shape.vocab}"
        yield Case("routing_stats", label, partial(ops.routing_stats, logits), logits.nbytes)


def sampling_cases(bench: Bench) -> Iterator[Case]:
    """Yield cases that sample and penalise a row of each request, at temperature 0.6 and top-p 0.95."""
    parameters = torch.tensor([0.6, 1 << 30, 0.95, 0.0], device=bench.device).repeat(bench.slots, 1)
    table = ops.SamplingTable(parameters, bench.below(1 << 30, bench.slots))
    own = torch.arange(bench.slots, device=bench.device)[:, None]
    penalties = ops.PenaltyTable(
        bench.chances(bench.slots, 3) + 1,
        own * torch.tensor([1, 1, 0, 0], device=bench.device),
        bench.chances(bench.slots, bench.shape.vocab),
        torch.zeros(bench.slots, bench.shape.vocab, dtype=torch.int32, device=bench.device),
    )
    text = bench.below(bench.shape.vocab, bench.slots, bench.sizes.context)
    for rows in bench.sizes.batches:
        logits = bench.random(rows, bench.shape.vocab).mul_(bench.shape.vocab**0.5 * 3)
        indptr = torch.arange(rows + 1, dtype=torch.int32, device=bench.device)
        lengths, slots = bench.below(bench.sizes.context, rows), bench.below(bench.slots - 1, rows) + 1
        call = partial(ops.sample_rows, logits, indptr, lengths, slots, table)
        yield Case("sample_rows", f"{rows} x {bench.shape.vocab}", call, logits.nbytes)
        batch = bench.below(bench.shape.vocab, rows), indptr, lengths, slots, text
        call = partial(ops.penalise_rows, logits.float(), *batch, penalties)
        yield Case("penalise_rows", f"{rows} x {bench.shape.vocab}", call, 16 * logits.numel())


def backlog_cases(bench: Bench, fill: int | None = None) -> Iterator[Case]:
    """Yield cases that park a verification's 16 rows of each request, and unpark the DFlash drafter's columns."""
    s = bench.shape
    width = s.captured * s.hidden
    largest = [] if fill is None else [(fill, CAPACITY)]
    for batch, length in [(b, s.block) for b in bench.sizes.batches] + largest:
        features, tokens = bench.random(batch * length, width), bench.below(s.vocab, batch * length)
        slots, begins = bench.request_slots(batch), bench.below(bench.sizes.context - CAPACITY, batch)
        lengths = torch.full_like(begins, length)
        starts = torch.arange(0, batch * length, length, device=bench.device)
        arguments = (bench.rings, features, tokens, slots, begins, lengths, starts)
        call = partial(ops.park, *arguments, max_length=length)
        yield Case("park", f"{batch} x {length} rows", call, 2 * features.nbytes)
    taken = len(s.dflash_chunks) * s.hidden * bench.rings.features.element_size()
    for batch, length in [(b, n) for b in bench.sizes.batches for n in bench.sizes.backlogs] + largest:
        slots, begins = bench.request_slots(batch), bench.below(bench.sizes.context - CAPACITY, batch)
        arguments = (bench.rings, slots, begins, begins + length, bench.table)
        options = {"rows": batch * length, "chunks": s.dflash_chunks, "chunk_width": s.hidden}
        call = partial(ops.unpark, *arguments, **options)
        moved = 2 * batch * length * taken
        yield Case("unpark", f"{batch} x {length} rows", call, moved)


def catch_up_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    dflash, eagle3 = bench.dflash_weights(), bench.eagle3_weights()
    dflash_pools, eagle3_pools = bench.pools(s.dflash_layers), bench.pools(1)
    for rows in bench.sizes.rows:
        slots = bench.order(bench.slots * bench.sizes.context)[:rows]
        positions, tokens = bench.below(bench.sizes.context, rows), bench.below(s.vocab, rows)
        features = bench.random(rows, dflash.fc.shape[1])
        arguments = (features, positions, slots, dflash, bench.rope, dflash_pools)
        written = rows * dflash.kv.shape[0] * features.element_size()
        yield Case(
            "dflash_catch_up",
            f"{rows} rows",
            partial(ops.dflash_catch_up, *arguments),
            features.nbytes + dflash.fc.nbytes + dflash.kv.nbytes + written,
            2 * rows * (dflash.fc.numel() + dflash.kv.numel()),
        )
        features = bench.random(rows, eagle3.fc.shape[1])
        chain = (features, tokens, positions, slots, eagle3, bench.rope, eagle3_pools)
        written = rows * eagle3.kv.shape[0] * features.element_size()
        gathered = rows * s.hidden * features.element_size()
        yield Case(
            "eagle3_catch_up",
            f"{rows} rows",
            partial(ops.eagle3_catch_up, *chain),
            features.nbytes + eagle3.fc.nbytes + eagle3.kv.nbytes + gathered + written,
            2 * rows * (eagle3.fc.numel() + eagle3.kv.numel()),
        )


def block_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    for batch in bench.sizes.batches:
        each = [(1, 4, s.block)[b % 3] for b in range(batch)]
        widths, rows = torch.tensor(each, device=bench.device), sum(each)
        bonus, drafts = bench.below(s.vocab, batch), bench.below(s.vocab, batch, s.block - 1)
        lengths, slots = bench.below(bench.sizes.context - s.block, batch), bench.request_slots(batch)
        prepare = partial(ops.prepare_mixed_block, bonus, drafts, widths, lengths, slots, bench.table, rows=rows)
        block = prepare()
        predictions = block.input_ids.roll(-1)
        # Ids in and out, positions, slots and owners: five int64 a row.
        yield Case("prepare_mixed_block", f"{batch} requests, {rows} rows", prepare, 5 * 8 * rows)
        ints = partial(torch.zeros, dtype=torch.int32, device=bench.device)
        places = ops.GraphSlots(ints(batch), ints(batch + 1), torch.zeros_like(lengths), ints(batch), slots.clone())
        call = partial(ops.fill_slots, widths, lengths, slots, places, rows=rows, empty=1)
        yield Case("fill_slots", f"{batch} requests", call, batch * (8 + 8 + 8 + 4 * 3 + 8 * 2))
        stops = torch.full((bench.slots, 8), -1, device=bench.device)
        commit = {"stride": s.block, "request_slots": slots, "stops": stops, "text": bench.text}
        call = partial(ops.accept_and_commit, predictions, block.input_ids, block.qo_indptr, lengths, **commit)
        # Both ids of a row; a request's stops, and its tokens for the engine and the text.
        moved = 2 * 8 * rows + 8 * 8 * batch + (8 + 8) * batch * s.block
        yield Case("accept_and_commit", f"{batch} requests, {rows} rows", call, moved)


def attention_cases(bench: Bench) -> Iterator[Case]:
    """Yield cases of draft attention over the whole context: a chain's step and a block."""
    s, context = bench.shape, bench.sizes.context
    for batch in bench.sizes.batches:
        for width in (1, s.block):
            q, pool = bench.random(batch * width, s.heads, s.dim), bench.pools(1)
            slots = bench.request_slots(batch)
            lengths = torch.full((batch,), context - width, device=bench.device)
            arguments = (q, pool.k[0], pool.v[0], bench.table, slots, lengths)
            options = {"extra": width, "width": width, "causal": width == 1, "scale": s.dim**-0.5}
            entries = batch * context
            yield Case(
                "draft_attention",
                f"{batch} x {width} rows over {context}",
                partial(ops.draft_attention, *arguments, **options),
                2 * entries * s.kv_heads * s.dim * q.element_size() + 2 * q.nbytes,
                4 * entries * width * s.heads * s.dim,
                others={"torch, K and V contiguous": contiguous_attention(bench, q, batch, width)},
                compilable=partial(attention.draft_attention, *arguments, **options, window=None, longest=context),
            )


WIDEST = 17
"""Rows of a request that is verified, at most."""
MOST_TOKENS = 1 << 20
"""Tokens of all prefixes of a case, at most: of more, K and V would not fit beside the rest."""


def verify_cases(bench: Bench) -> Iterator[Case]:
    """Yield cases of verification: requests of 1, 8 and 17 rows after random contexts, then of equal sizes."""
    for context in (bench.sizes.context, *bench.sizes.long):
        for batch in (n for n in bench.sizes.batches if n * context <= MOST_TOKENS or not bench.sizes.long):
            ragged = [(1, 8, WIDEST)[i % 3] for i in range(batch)]
            yield verify_case(bench, f"{batch} x 1, 8 or 17", ragged, bench.below(context, batch) + 1, context)
            lengths = torch.full((batch,), context, device=bench.device)
            for width in (1, 8, WIDEST):
                yield verify_case(bench, f"{batch} x {width}", [width] * batch, lengths, context)


def verify_case(bench: Bench, label: str, widths: list[int], lengths: torch.Tensor, context: int) -> Case:
    s, total, slots = bench.shape, sum(widths), len(widths) * context
    q, out = bench.random(total, s.heads, s.dim), bench.random(total, s.heads, s.dim)
    k, v = (bench.random(total, s.kv_heads, s.dim) for _ in range(2))
    pools = [bench.random(slots, s.kv_heads, s.dim) for _ in range(2)]
    qo, kv = (
        F.pad(n.cumsum(0), (1, 0)).to(dtype)
        for n, dtype in ((torch.tensor(widths, device=bench.device), torch.int64), (lengths, torch.int32))
    )
    arguments = (q, k, v, out, *pools, qo, kv, bench.order(slots))
    most = min(total, WIDEST)
    options = {"most": most, "scale": s.dim**-0.5}
    return Case(
        "verify_attention",
        f"{label} rows behind up to {context}",
        partial(ops.verify_attention, *arguments, **options),
        2 * slots * s.kv_heads * s.dim * q.element_size() + 2 * q.nbytes + 2 * k.nbytes,
        4 * slots * max(widths) * s.heads * s.dim,
        others=upstream_verification(bench, arguments, most),
    )


def upstream_verification(bench: Bench, arguments: tuple, most: int) -> dict[str, Call]:
    """Return SGLang's kernel on the arguments of `verify_attention`; empty without SGLang or a GPU."""
    if bench.device.type != "cuda":
        return {}
    try:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd
    except ImportError:
        return {}
    rest = (None, True, None, most, 1.0, 1.0, bench.shape.dim**-0.5)
    return {"sglang": partial(extend_attention_fwd, *arguments, *rest)}


def contiguous_attention(bench: Bench, q: torch.Tensor, batch: int, width: int) -> Call:
    """Return torch's fused attention over contiguous K and V of equal length, its best case."""
    s = bench.shape
    by_head = q.view(batch, width, s.heads, s.dim).transpose(1, 2)
    keys, values = (bench.random(batch, s.kv_heads, bench.sizes.context, s.dim) for _ in range(2))
    return partial(F.scaled_dot_product_attention, by_head, keys, values, enable_gqa=True)


def router_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    layers = (
        bench.random(s.router_units, s.hidden),
        bench.random(s.router_units),
        bench.random(1, s.router_units),
        bench.random(1),
    )
    for batch in bench.sizes.batches:
        hidden = bench.random(batch, s.hidden)
        call, moved = partial(ops.router_mlp, hidden, *layers), layers[0].nbytes + hidden.nbytes
        yield Case("router_mlp", f"{batch} x {s.hidden}", call, moved, 2 * batch * layers[0].numel())


def pass_cases(bench: Bench) -> Iterator[Case]:
    """Yield cases that gather a pass's inputs: backlogs of two drafters, a chain's inputs, a block's rows."""
    s = bench.shape
    width = len(s.eagle3_chunks) * s.hidden * bench.rings.features.element_size()
    for batch in bench.sizes.batches:
        slots, lengths = bench.request_slots(batch), bench.below(bench.sizes.context - s.block, batch) + 1
        marks = torch.zeros(2, bench.slots, dtype=torch.int64, device=bench.device)
        due = torch.ones(2, batch, dtype=torch.int64, device=bench.device)
        call = partial(ops.claim_backlogs, marks, slots, lengths, due)
        yield Case("claim_backlogs", f"2 drafters, {batch} requests", call, 8 * (2 * batch + 5 * 2 * batch))
        members, bonus = torch.arange(batch, device=bench.device), bench.below(s.vocab, batch)
        calibration = torch.ones(BINS + 2, device=bench.device)
        chunks = {"chunks": s.eagle3_chunks, "chunk_width": s.hidden}
        call = partial(ops.draft_inputs, bench.rings, members, slots, lengths, bonus, bonus, calibration, **chunks)
        yield Case("draft_inputs", f"{batch} requests", call, batch * (9 * 8 + 2 * width))
        call = partial(ops.pass_rows, bench.table, slots, lengths, bonus, offset=0, width=s.block, fill=0)
        yield Case("pass_rows", f"{batch} x {s.block} rows", call, batch * (3 * 8 + s.block * (4 + 3 * 8)))


def draft_cases(bench: Bench) -> Iterator[Case]:
    """Yield cases that count, pack and choose drafts: chains for half of the batch, blocks for the other half."""
    s = bench.shape
    edges = torch.linspace(0.1, 0.97, BINS - 1, device=bench.device)
    calibration = torch.linspace(0.05, 0.99, BINS + 2, device=bench.device).index_fill_(
        0, torch.tensor([BINS + 1], device=bench.device), 0.1
    )
    for batch in bench.sizes.batches:
        slots, lengths = bench.request_slots(batch), bench.below(bench.sizes.context - 2 * COPIED, batch)
        order = bench.order(batch)
        parts = []
        for members, width in ((order[: batch // 2], 7), (order[batch // 2 :], s.block - 1)):
            sure = bench.chances(len(members), width)
            limits = torch.full_like(members, width)
            call = partial(ops.cut_drafts, sure, calibration, edges, limits)
            if width == s.block - 1:
                yield Case("cut_drafts", f"{len(members)} x {width}", call, 8 * sure.numel() + 16 * len(members))
            counts, alive = call()
            tokens = bench.below(s.vocab, len(members), width)
            parts.append((members, ops.Drafts(tokens, counts, alive, sure)))
        lay = partial(
            ops.lay_drafts,
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
        chances = bench.chances(batch, COPIED).cumprod(1)
        copies = ops.Drafts(bench.below(s.vocab, batch, COPIED), torch.full((batch,), 4, device=bench.device), chances)
        choose = partial(
            ops.choose_drafts,
            lay(),
            slots,
            lengths,
            bench.text,
            appended=copies,
            copies=copies,
            worth=0.1,
            most_drafts=4 * batch,
        )
        # The batch's drafts, those behind and the copies; tokens out twice, chances out and in.
        moved = batch * COPIED * (3 * 12 + 2 * 8 + 2 * 4)
        yield Case("choose_drafts", f"{batch} requests", choose, moved)


def copy_cases(bench: Bench) -> Iterator[Case]:
    """Yield cases that search texts without anything to copy, each of which is read to its beginning."""
    context = bench.sizes.context
    texts = torch.arange(bench.slots * context, device=bench.device).view(bench.slots, context)
    boundaries = torch.tensor([1, 2, 3, 4, 6, 9, 14, 22], dtype=torch.int32, device=bench.device)
    back = torch.zeros(bench.slots, dtype=torch.int64, device=bench.device)
    for batch in bench.sizes.batches:
        lengths = torch.full((batch,), context - 1, device=bench.device)
        limits = torch.full_like(lengths, COPIED)
        ones = torch.ones(batch, device=bench.device)
        chances = torch.full((batch, 8, 4), 0.5, device=bench.device)
        arguments = (texts, bench.request_slots(batch), lengths, back, limits, ones, chances, boundaries)
        call = partial(ops.propose_copies, *arguments, width=COPIED, worth=0.1)
        yield Case("propose_copies", f"{batch} x {context} tokens", call, 8 * batch * context)


def layer_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    for rows in sorted({size for batch in bench.sizes.batches for size in (batch, batch * s.block)}):
        x, weight = bench.random(rows, s.hidden), bench.random(s.hidden)
        call = partial(rms_norm, x, weight, 1e-6)
        yield Case("rms_norm", f"{rows} x {s.hidden}", call, 2 * x.nbytes + weight.nbytes)
        gate_up = bench.random(rows, 2 * s.intermediate)
        call = partial(silu_and_mul, gate_up)
        yield Case("silu_and_mul", f"{rows} x {s.intermediate}", call, gate_up.nbytes * 3 // 2)


KERNELS = (
    routing_cases,
    sampling_cases,
    backlog_cases,
    attention_cases,
    verify_cases,
    block_cases,
    pass_cases,
    draft_cases,
    copy_cases,
    router_cases,
)
"""Makers of cases that launch kernels of ours and no product of a library."""
