"""FA3 of another release of sglang-kernel: does it load here, is it right, and how long does a layer take?

`python tests/gpu/fa3.py figures.json`. Ragged rows over a paged cache with pages of one token, as SGLang calls it,
beside torch in float32; then a layer's time in graphs, for Qwen3-8B's heads and for those of the widened pair.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from checks import Checks

SHAPES = {"Qwen3-8B": (32, 8, 128), "wide": (64, 16, 64)}
"""Heads, KV heads, size of a head."""
RIGHT = ((1, 2048, 1), (3, 777, 5), (8, 1024, 16))
"""Requests, tokens of a request's context, rows of a request."""
TIMED = (
    *((requests, 1024, width) for requests in (1, 32, 48) for width in (1, 4, 5, 16)),
    *((1, 131072, width) for width in (1, 8)),
)
LARGEST = 0.01
"""Largest norm of the difference over the norm of torch's answer: bfloat16 rounds to 2**-8."""


@dataclass(frozen=True)
class Case:
    """Random queries, cache and page table of `requests` requests, each with `width` rows behind `context` tokens."""

    requests: int
    context: int
    width: int
    shape: tuple[int, int, int]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Queries [rows, heads, size], keys and values [slots, 1, KV heads, size], page table [requests, tokens]."""
        heads, kv_heads, size = self.shape
        tokens = self.context + self.width
        slots = self.requests * tokens + 1
        made = {"device": "cuda", "dtype": torch.bfloat16}
        k, v = (torch.randn(slots, 1, kv_heads, size, **made) for _ in range(2))
        q = torch.randn(self.requests * self.width, heads, size, **made)
        table = torch.randperm(slots - 1, device="cuda")[: self.requests * tokens] + 1
        return q, k, v, table.view(self.requests, -1).int()

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        lengths = torch.full((self.requests,), self.context + self.width, device="cuda", dtype=torch.int32)
        ends = torch.arange(0, len(q) + 1, self.width, device="cuda", dtype=torch.int32)
        rows = {"cache_seqlens": lengths, "cu_seqlens_q": ends, "max_seqlen_q": self.width}
        scale = 1 / math.sqrt(self.shape[2])
        return lambda: flash_attn_with_kvcache(
            q=q, k_cache=k, v_cache=v, page_table=table, softmax_scale=scale, causal=True, **rows
        )

    def reference(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """The same in float32, a request at a time."""
        at = torch.arange(self.context + self.width, device="cuda")
        hidden = at[None] > (self.context + torch.arange(self.width, device="cuda"))[:, None]
        outputs = []
        for rows, slots in zip(q.float().split(self.width), table.long(), strict=True):
            keys, values = (x[slots, 0].float().repeat_interleave(self.shape[0] // self.shape[1], 1) for x in (k, v))
            scores = torch.einsum("rhd,thd->hrt", rows, keys) / math.sqrt(self.shape[2])
            outputs.append(torch.einsum("hrt,thd->rhd", scores.masked_fill(hidden, -math.inf).softmax(-1), values))
        return torch.cat(outputs)


def milliseconds(call: Callable[[], object], calls: int = 8) -> float:
    """The median time of a call, from graphs of several."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return median(times)


def main(out: Path) -> int:
    torch.manual_seed(0)
    checks = Checks(out, label="FA3 beside torch, and milliseconds of a layer")
    for name, shape in SHAPES.items():
        with checks.check(f"{name} is right") as figures:
            for sizes in RIGHT:
                case = Case(*sizes, shape)
                tensors = case.tensors()
                got, wanted = case.call(*tensors)().float(), case.reference(*tensors)
                apart = figures[" ".join(map(str, sizes))] = float((got - wanted).norm() / wanted.norm())
                assert apart < LARGEST, f"{sizes}: FA3 and torch differ by {apart:.4f} of the answer's norm"
        with checks.check(f"{name} in time") as figures:
            for sizes in TIMED:
                case = Case(*sizes, shape)
                figures[" ".join(map(str, sizes))] = milliseconds(case.call(*case.tensors()))
    return checks.exit_status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
