"""Rows of strands attend bit for bit as their paths do alone, in bfloat16, where attention is compiled."""

import random
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from whiflash_kernels.cpu.paged_attention import CompiledAttention

from whiflash_sglang.core import Strand
from whiflash_sglang.platform.attention import attention_kernel
from whiflash_sglang.round.strands import pack

HEADS, KV_HEADS, DIM, CONTEXT, ROWS = 4, 2, 16, 64, 8
SPARE = (6, 1, 7, 4, 5)


class Entry(NamedTuple):
    """Of one row: q [Hq, D], k and v [Hkv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor


class Case:
    """Three requests with first chains and strands of random lengths."""

    def __init__(self, seed: int) -> None:
        rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.rows, self.lengths = [2, 0, 3], [rng.randint(1, 40) for _ in range(3)]
        self.table = torch.randperm(ROWS * CONTEXT, generator=self.generator).view(ROWS, CONTEXT).int()
        self.k, self.v = (self.random(ROWS * CONTEXT, KV_HEADS, DIM) for _ in range(2))
        self.chains = [self.entries(1 + rng.randint(0, 6)) for _ in self.rows]
        self.strands: list[tuple[Strand, list[Entry]]] = []
        used = [len(chain) for chain in self.chains]
        for owner in sorted(rng.choices(range(3), k=rng.randint(1, len(SPARE)))):
            own = self.entries(rng.randint(1, 4))
            fork = rng.randint(0, len(self.chains[owner]) - 1)
            self.strands.append((Strand(owner, fork, [0] * len(own), used[owner], 0.5, "free"), own))
            used[owner] += len(own)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).bfloat16()

    def entries(self, count: int) -> list[Entry]:
        kv = KV_HEADS, DIM
        return [Entry(self.random(HEADS, DIM), self.random(*kv), self.random(*kv)) for _ in range(count)]

    def attended(
        self, kernel: CompiledAttention, window: int | None, groups: list[tuple[int, int, list[Entry]]]
    ) -> Tensor:
        """[T, Hq, D] of groups that follow each other: each a row of the table, a start, and entries from there on."""
        k, v = self.k.clone(), self.v.clone()
        for row, start, entries in groups:
            for position, entry in enumerate(entries, start):
                slot = int(self.table[row, position])
                k[slot], v[slot] = entry.k, entry.v
        widths = [len(entries) for *_, entries in groups]
        ends = [start + width for (_, start, _), width in zip(groups, widths, strict=True)]
        rows = torch.tensor([row for row, *_ in groups])
        plan = kernel.plan(self.table, widths, ends, causal=True, request_rows=rows, window=window)
        return plan.run(torch.stack([entry.q for *_, own in groups for entry in own]), k, v, DIM**-0.5)

    def packed(self) -> list[tuple[int, int, list[Entry]]]:
        """The groups of a forward with strands, whose rows of the table `pack` writes."""
        drafts = torch.zeros((3, max(map(len, self.chains)) - 1), dtype=torch.int64)
        widths = torch.tensor([len(chain) for chain in self.chains], dtype=torch.int32)
        rows, starts = torch.tensor(self.rows), torch.tensor(self.lengths)
        requests = (torch.zeros(3, dtype=torch.int64), drafts, widths, starts, rows)
        strands = [strand for strand, _ in self.strands]
        (*_, starts, rows), _ = pack(requests, self.lengths, strands, SPARE, self.table)
        entries = [*self.chains, *(own for _, own in self.strands)]
        return list(zip(rows.tolist(), starts.tolist(), entries, strict=True))


@pytest.mark.parametrize("window", [None, 8])
def test_rows_are_those_of_their_path_alone_and_of_plain_decoding(window: int | None) -> None:
    kernel = attention_kernel()
    if kernel is None:
        pytest.skip("attention is not compiled here")
    for seed in range(40):
        case = Case(seed)
        groups = case.packed()
        together = case.attended(kernel, window, groups)
        ends = list(accumulate(len(entries) for *_, entries in groups))
        first = [end - len(entries) for end, (*_, entries) in zip(ends, groups, strict=True)]
        for number, (strand, own) in enumerate(case.strands, 3):
            row, start = case.rows[strand.owner], case.lengths[strand.owner]
            path = [*case.chains[strand.owner][: strand.fork + 1], *own]
            shared = range(first[strand.owner], first[strand.owner] + strand.fork + 1)
            found = together[[*shared, *range(first[number], ends[number])]]
            assert torch.equal(found, case.attended(kernel, window, [(row, start, path)])), (seed, strand)
            for width, entry in enumerate(found, 1):
                plain = case.attended(kernel, window, [(row, start, path[:width])])
                assert torch.equal(entry, plain[-1]), (seed, strand, width)
