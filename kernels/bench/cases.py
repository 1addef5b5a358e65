"""What is measured: every op at a model's shapes, with the bytes and operations it cannot do without."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from measure import Call
from shapes import ModelShape
from torch.nn.functional import scaled_dot_product_attention
from whiflash_kernels import (
    BacklogRings,
    DFlashWeights,
    Eagle3Weights,
    KVPools,
    accept_and_commit,
    dflash_catch_up,
    draft_attention,
    eagle3_catch_up,
    park,
    prepare_mixed_block,
    router_mlp,
    routing_stats,
    unpark,
)
from whiflash_kernels.reference import attention as reference

CONTEXT = 2048
BATCHES = (1, 8, 32)
BACKLOGS = (1, 16, 64)
CAPACITY = 64
CATCH_UP_ROWS = (1, 16, 64, 512)


@dataclass(frozen=True)
class Case:
    """One op at one size. ``call`` goes through the public op, so either implementation can be forced."""

    op: str
    label: str
    call: Call
    moved_bytes: int
    """Each input read once, each output written once."""
    flops: int = 0
    fills_the_chip: bool = False
    others: dict[str, Call] = field(default_factory=dict)
    """Other people's implementations, by name."""
    compilable: Call | None = None
    """The reference for torch.compile, where the op hides it behind an operator of torch; None: ``call``."""


class Bench:
    """Random tensors of one model on one device."""

    def __init__(self, shape: ModelShape, device: torch.device, largest_batch: int) -> None:
        self.shape, self.device, self.slots = shape, device, largest_batch + 1
        self.generator = torch.Generator(device=device).manual_seed(0)
        table = torch.randperm(self.slots * CONTEXT, device=device, generator=self.generator)
        self.table = table.view(self.slots, CONTEXT).int()
        self.rings = BacklogRings(
            self.random(self.slots, CAPACITY, shape.captured * shape.hidden),
            self.below(shape.vocab, self.slots, CAPACITY),
        )
        self.text = torch.zeros(self.slots, CONTEXT, dtype=torch.int64, device=device)
        self.rope = torch.rand(CONTEXT, shape.dim, device=device, generator=self.generator) * 2 - 1

    def random(self, *size: int) -> torch.Tensor:
        scale = size[-1] ** -0.5 if len(size) > 1 else 1.0
        values = torch.randn(size, device=self.device, generator=self.generator, dtype=self.shape.dtype)
        return values.mul_(scale)

    def below(self, limit: int, *size: int) -> torch.Tensor:
        return torch.randint(0, limit, size, device=self.device, generator=self.generator)

    def pools(self, layers: int) -> KVPools:
        size = (self.slots * CONTEXT, self.shape.kv_heads, self.shape.dim)
        return KVPools(
            tuple(self.random(*size) for _ in range(layers)),
            tuple(self.random(*size) for _ in range(layers)),
        )

    def request_slots(self, batch: int) -> torch.Tensor:
        return torch.randperm(self.slots, device=self.device, generator=self.generator)[:batch]

    def dflash_weights(self) -> DFlashWeights:
        s = self.shape
        return DFlashWeights(
            fc=self.random(s.hidden, len(s.dflash_chunks) * s.hidden),
            hidden_norm=self.random(s.hidden),
            kv=self.random(s.dflash_layers * 2 * s.kv_heads * s.dim, s.hidden),
            k_norm=self.random(s.dflash_layers, s.dim),
            eps=1e-6,
        )

    def eagle3_weights(self) -> Eagle3Weights:
        s = self.shape
        return Eagle3Weights(
            fc=self.random(s.hidden, len(s.eagle3_chunks) * s.hidden),
            embedding=self.random(s.vocab, s.hidden),
            input_norm=self.random(s.hidden),
            hidden_norm=self.random(s.hidden),
            kv=self.random(2 * s.kv_heads * s.dim, 2 * s.hidden),
            eps=1e-6,
        )


def routing_cases(bench: Bench, fill: int | None) -> Iterator[Case]:
    for rows in (*BATCHES, *([] if fill is None else [fill])):
        logits = bench.random(rows, bench.shape.vocab).mul_(bench.shape.vocab**0.5 * 3)
        label = f"{rows} x {bench.shape.vocab}"
        yield Case(
            "routing_stats", label, partial(routing_stats, logits), logits.nbytes, fills_the_chip=rows == fill
        )


def backlog_cases(bench: Bench, fill: int | None) -> Iterator[Case]:
    """park: a verification's 16 rows for each request; unpark: the DFlash drafter's columns."""
    s = bench.shape
    width = s.captured * s.hidden
    largest = [] if fill is None else [(fill, CAPACITY)]
    for batch, length in [(b, s.block) for b in BATCHES] + largest:
        features, tokens = bench.random(batch * length, width), bench.below(s.vocab, batch * length)
        slots, begins = bench.request_slots(batch), bench.below(CONTEXT - CAPACITY, batch)
        lengths = torch.full_like(begins, length)
        starts = torch.arange(0, batch * length, length, device=bench.device)
        arguments = (bench.rings, features, tokens, slots, begins, lengths, starts)
        call = partial(park, *arguments, max_length=length)
        yield Case(
            "park", f"{batch} x {length} rows", call, 2 * features.nbytes, fills_the_chip=batch == fill
        )
    taken = len(s.dflash_chunks) * s.hidden * bench.rings.features.element_size()
    for batch, length in [(b, n) for b in BATCHES for n in BACKLOGS] + largest:
        slots, begins = bench.request_slots(batch), bench.below(CONTEXT - CAPACITY, batch)
        arguments = (bench.rings, slots, begins, begins + length, bench.table)
        options = {"rows": batch * length, "chunks": s.dflash_chunks, "chunk_width": s.hidden}
        call = partial(unpark, *arguments, **options)
        moved = 2 * batch * length * taken
        yield Case("unpark", f"{batch} x {length} rows", call, moved, fills_the_chip=batch == fill)


def catch_up_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    dflash, eagle3 = bench.dflash_weights(), bench.eagle3_weights()
    dflash_pools, eagle3_pools = bench.pools(s.dflash_layers), bench.pools(1)
    for rows in CATCH_UP_ROWS:
        slots = torch.randperm(bench.slots * CONTEXT, device=bench.device, generator=bench.generator)[:rows]
        positions, tokens = bench.below(CONTEXT, rows), bench.below(s.vocab, rows)
        features = bench.random(rows, dflash.fc.shape[1])
        arguments = (features, positions, slots, dflash, bench.rope, dflash_pools)
        written = rows * dflash.kv.shape[0] * features.element_size()
        yield Case(
            "dflash_catch_up",
            f"{rows} rows",
            partial(dflash_catch_up, *arguments),
            features.nbytes + dflash.fc.nbytes + dflash.kv.nbytes + written,
            2 * rows * (dflash.fc.numel() + dflash.kv.numel()),
            others=upstream_dflash(bench, arguments),
        )
        features = bench.random(rows, eagle3.fc.shape[1])
        chain = (features, tokens, positions, slots, eagle3, bench.rope, eagle3_pools)
        written = rows * eagle3.kv.shape[0] * features.element_size()
        gathered = rows * s.hidden * features.element_size()
        yield Case(
            "eagle3_catch_up",
            f"{rows} rows",
            partial(eagle3_catch_up, *chain),
            features.nbytes + eagle3.fc.nbytes + eagle3.kv.nbytes + gathered + written,
            2 * rows * (eagle3.fc.numel() + eagle3.kv.numel()),
        )


def upstream_dflash(bench: Bench, arguments: tuple) -> dict[str, Call]:
    """SGLang's own materialisation of the same K and V, if SGLang and a GPU are available."""
    if bench.device.type != "cuda":
        return {}
    try:
        from upstream import materialise
    except ImportError:
        return {}
    return {"sglang": materialise(bench.shape, arguments)}


def block_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    for batch in BATCHES:
        widths = torch.tensor([(1, 4, s.block)[b % 3] for b in range(batch)], device=bench.device)
        rows = int(widths.sum())
        bonus, drafts = bench.below(s.vocab, batch), bench.below(s.vocab, batch, s.block - 1)
        lengths, slots = bench.below(CONTEXT - s.block, batch), bench.request_slots(batch)
        arguments = (bonus, drafts, widths, lengths, slots, bench.table)
        block = prepare_mixed_block(*arguments, rows=rows)
        predictions = block.input_ids.roll(-1)
        # Ids in and out, positions, slots and owners: five int64 a row.
        yield Case(
            "prepare_mixed_block",
            f"{batch} requests, {rows} rows",
            partial(prepare_mixed_block, *arguments, rows=rows),
            5 * 8 * rows,
        )
        commit = (predictions, block.input_ids, block.qo_indptr, lengths)
        stops = torch.full((bench.slots, 8), -1, device=bench.device)
        call = partial(
            accept_and_commit, *commit, stride=s.block, request_slots=slots, stops=stops, text=bench.text
        )
        # Both ids of a row; a request's stops, and its tokens for the engine and the text.
        moved = 2 * 8 * rows + 8 * 8 * batch + (8 + 8) * batch * s.block
        yield Case("accept_and_commit", f"{batch} requests, {rows} rows", call, moved)


def attention_cases(bench: Bench) -> Iterator[Case]:
    """A chain step and a block over nearly the whole context."""
    s = bench.shape
    for batch in BATCHES:
        for width in (1, s.block):
            q, pool = bench.random(batch * width, s.heads, s.dim), bench.pools(1)
            slots, lengths = bench.request_slots(batch), bench.below(64, batch) + CONTEXT - 64 - width
            arguments = (q, pool.k[0], pool.v[0], bench.table, slots, lengths)
            options = {"extra": width, "width": width, "causal": width == 1, "scale": s.dim**-0.5}
            entries = int(lengths.sum()) + batch * width
            yield Case(
                "draft_attention",
                f"{batch} x {width} rows over {CONTEXT - 64} or more",
                partial(draft_attention, *arguments, **options),
                2 * entries * s.kv_heads * s.dim * q.element_size() + 2 * q.nbytes,
                4 * entries * width * s.heads * s.dim,
                others={"torch, K and V contiguous": contiguous_attention(bench, q, batch, width)},
                compilable=partial(
                    reference.draft_attention, *arguments, **options, window=None, longest=CONTEXT
                ),
            )


def contiguous_attention(bench: Bench, q: torch.Tensor, batch: int, width: int) -> Call:
    """torch's fused attention where nothing is paged and all contexts are equally long: what it does at best."""
    s = bench.shape
    by_head = q.view(batch, width, s.heads, s.dim).transpose(1, 2)
    keys, values = (bench.random(batch, s.kv_heads, CONTEXT, s.dim) for _ in range(2))
    return partial(scaled_dot_product_attention, by_head, keys, values, enable_gqa=True)


def router_cases(bench: Bench) -> Iterator[Case]:
    s = bench.shape
    layers = (
        bench.random(s.router_units, s.hidden),
        bench.random(s.router_units),
        bench.random(1, s.router_units),
        bench.random(1),
    )
    for batch in BATCHES:
        hidden = bench.random(batch, s.hidden)
        yield Case(
            "router_mlp",
            f"{batch} x {s.hidden}",
            partial(router_mlp, hidden, *layers),
            layers[0].nbytes + hidden.nbytes,
            2 * batch * layers[0].numel(),
        )


def switch_call(bench: Bench, arm: str, tokens: int = 16) -> Call:
    """A whole switch at batch 1: unpark, catch-up of ``tokens`` positions, routing statistics of one row."""
    s = bench.shape
    slots, begins = bench.request_slots(1), bench.below(CONTEXT - tokens, 1)
    logits = bench.random(1, s.vocab)
    chunks = s.dflash_chunks if arm == "diffusion" else s.eagle3_chunks
    pools = bench.pools(s.dflash_layers if arm == "diffusion" else 1)
    dflash, eagle3 = bench.dflash_weights(), bench.eagle3_weights()

    def call() -> None:
        packed = unpark(
            bench.rings,
            slots,
            begins,
            begins + tokens,
            bench.table,
            rows=tokens,
            chunks=chunks,
            chunk_width=s.hidden,
        )
        places = (packed.positions, packed.cache_slots)
        if arm == "diffusion":
            dflash_catch_up(packed.features, *places, dflash, bench.rope, pools)
        else:
            eagle3_catch_up(packed.features, packed.next_tokens, *places, eagle3, bench.rope, pools)
        routing_stats(logits)

    return call
