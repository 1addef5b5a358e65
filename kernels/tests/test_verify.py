"""verify_attention against a float64 oracle, whatever a pool holds where nobody looks."""

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unittest import mock

import kernel_oracles as oracles
import pytest
import torch
from kernel_backends import BACKENDS, DEVICE, INTERPRETING, guarded_outputs, integers, running, watched_merges
from kernel_tolerances import assert_close
from whiflash_kernels import verify_attention
from whiflash_kernels.verify import EIGHT_BITS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Batch:
    """Random requests over one pool, whose slots that nobody owns hold NaN."""

    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int | None = None
    cap: float = 0.0
    sunk: bool = False
    dtype: torch.dtype = torch.float32
    pool: torch.dtype | None = None
    """8 bits, or q's."""
    spare: int = 0
    """Rows of nobody, behind the requests'."""
    roomy: int = 0
    """`most` above the widest request; below 0 its last rows are left out."""
    page: int = 1
    """Slots of a request that are beside each other."""
    planned: int = 0
    """Keys beyond the layer's window that the plan has: of another layer's window."""

    def check(self, backend: str, plans: dict[Any, Any] | None = None, layers: int = 1) -> None:
        generator = torch.Generator().manual_seed(sum(self.lengths) + sum(self.widths))

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        total, pages = sum(self.widths), [-(-length // self.page) for length in self.lengths]
        q, k, v = (normal(total + self.spare, n, self.dim) for n in (self.heads, *[self.kv_heads] * 2))
        order = torch.randperm(sum(pages) + 9, generator=generator)[: sum(pages)]
        slots = (order[:, None] * self.page + torch.arange(self.page)).split(pages)
        lists = [own.flatten()[:length] for own, length in zip(slots, self.lengths, strict=True)]
        # Keys and values are parts of wider rows, each of other ones.
        room = (sum(pages) + 9) * self.page
        k_pool, v_pool = (torch.full((room, self.kv_heads, self.dim + n), torch.nan) for n in (3, 5))
        for pool in (k_pool, v_pool):
            pool[torch.cat(lists), :, : self.dim] = normal(sum(self.lengths), self.kv_heads, self.dim)
        pools = (pool[..., : self.dim].to(DEVICE) for pool in (k_pool, v_pool))
        k_pool, v_pool = ((x * 2).to(self.pool) if self.pool else x.to(self.dtype) for x in pools)
        q, k, v = (tensor.to(self.dtype).to(DEVICE) for tensor in (q, k, v))
        sinks = torch.linspace(-2, 3, self.heads, device=DEVICE) if self.sunk else None
        how = {"scale": self.dim**-0.5, "window": self.window, "cap": self.cap, "sinks": sinks}
        how |= {"k_scale": 0.5, "v_scale": 0.25} if self.pool else {"k_scale": 1.0, "v_scale": 1.0}
        expected = oracles.verify_attention(q, k, v, k_pool, v_pool, lists, self.widths, **how)
        if self.window is not None:
            lists = [slots[max(len(slots) - self.window - self.planned, 0) :] for slots in lists]
        qo, kv = (integers([0, *accumulate(n)]) for n in (self.widths, map(len, lists)))
        kv = kv.int()
        # Places behind the lists hold what no pool has.
        indices = torch.cat((*lists, torch.full((64,), 10**9))).to(DEVICE)
        most = max(max(self.widths) + self.roomy, 1)
        how |= {"most": most, "plans": plans}
        counted = [row < most for width in self.widths for row in range(width)]
        kept = torch.tensor(counted + [False] * self.spare, dtype=torch.bool)
        for _ in range(layers):
            out = torch.full_like(q, torch.nan)
            with running(backend), guarded_outputs():
                verify_attention(q, k, v, out, k_pool, v_pool, qo, kv, indices, **how)
            assert_close(out.cpu()[kept], expected[kept[:total]], "attention", self.dtype)
            assert out.cpu()[~kept].isnan().all()


BATCHES = [
    *(Batch((5, 1, 3), (300, 2, 90), dtype=t, pool=p) for t in DTYPES for p in (None, torch.float8_e4m3fn)),
    Batch((3, 1, 5, 17, 2, 0, 0, 0), (300, 2, 90, 1, 1, 1, 1, 1)),  # a graph with slots of nobody
    Batch((33, 1), (70, 300), heads=8, kv_heads=1),  # rows of several tiles
    *(Batch((9, 1, 2), (150, 2, 0), window=n, planned=p) for n in (1, 7, 63, 500) for p in (0, 40)),
    Batch((0, 0), (0, 3), spare=2),
    Batch((5, 2), (300, 300), roomy=-2),  # a wrong count writes over nobody else's sums
]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_batches(backend: str, batch: Batch) -> None:
    with cut(backend, 9, 64):
        batch.check(backend)


def cut(backend: str, shares: int, fewest: int) -> mock._patch:
    """Into so many shares, of so many keys at least."""
    if backend == "torch":
        return mock.patch.dict({})
    from whiflash_kernels.triton_kernels import verify

    return mock.patch.multiple(verify, shares_for=lambda *_: shares, FEWEST_KEYS=fewest)


def random_batch(seed: int) -> Batch:
    rng = random.Random(seed)
    some = range(rng.randint(1, 6))
    lengths = [rng.choice((0, 1, 63, 64, 65, *(rng.randint(0, n) for n in (300, 300, 1000, 4096)))) for _ in some]
    widths = [rng.choice((0, 1, 1, 2, 3, 4, 5, 8, 16, 17, 33)) for _ in some]
    return Batch(
        tuple(widths),
        tuple(lengths),
        *rng.choice(((1, 1), (4, 4), (4, 2), (6, 2), (8, 2), (8, 1), (5, 1))),
        dim=rng.choice((40, 64, 80, 96, 128, 192, 256)),
        window=rng.choice((None, None, 1, 7, 63, 128, rng.randint(1, 4096))),
        cap=rng.choice((0.0, 0.0, 0.7, 30.0)),
        sunk=rng.random() < 0.4,
        dtype=rng.choice(DTYPES),
        pool=rng.choice((None, None, *EIGHT_BITS)),
        spare=rng.choice((0, 3)),
        roomy=rng.choice((0, 0, 5, -1)),
        page=rng.choice((1, 1, 16, 64)),
        planned=rng.choice((0, 40)),
    )


def test_random_batches(backend: str) -> None:
    for seed in range(*map(int, os.environ.get("WHIFLASH_SEEDS", "0,24").split(","))):
        with cut(backend, *random.Random(seed).choice(((2, 1), (5, 64), (16, 1), (33, 64), (33, 256)))):
            print(seed, batch := random_batch(seed))
            batch.check(backend)


@pytest.mark.evidence
@pytest.mark.parametrize("first", range(0, 2000, 200))
def test_random_batches_under_the_interpreter(first: int, request: pytest.FixtureRequest) -> None:
    if INTERPRETING or DEVICE.type == "cuda" or not request.config.getoption("--evidence", False):
        pytest.skip("a matrix: run `make evidence`, or with WHIFLASH_SEEDS=0,2000 on a card")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["WHIFLASH_SEEDS"] = f"{first},{first + 200}"
    command = [sys.executable, "-m", "pytest", __file__, "-k", "random_batches and triton"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
class TestTritonCuts:
    def test_a_long_request_alone_is_cut(self) -> None:
        """Into shares of 64 of its 2,100 keys, and only these leave sums, which the account of memory has room for."""
        batch = Batch((4, 1, 9, 1), (2100, 3, 0, 64))
        with cut("triton", 33, 64), watched_merges() as merges:
            batch.check("triton")
            from whiflash_kernels.triton_kernels import verify

            counted = verify.sums_bytes(4, 9, batch.heads, batch.kv_heads, batch.dim, DEVICE)
        ((cuts, partial),) = merges
        assert cuts == [(0, 0, 17)]
        assert int((~partial.isnan().any(1)).sum()) == 17 * 4 * batch.heads
        assert counted == len(partial) * (batch.dim + 2) * 4

    @pytest.mark.parametrize(
        ("lengths", "width", "busiest"),
        [
            ((131_072,), 8, 4032),  # SGLang's programs read 131,072
            ((131_072,), 17, 8256),  # whose rows are two tiles
            ((1024,) * 48, 8, 1600),
            ((200,) * 40, 8, 640),  # none is cut
            ((20_000, *range(0, 4000, 100), 131_072), 8, 7104),
        ],
    )
    def test_programs_that_run_at_once_read_as_many_keys(
        self, lengths: tuple[int, ...], width: int, busiest: int
    ) -> None:
        """Every step is in one program, those that no other shares are whole, and on an H200 none waits for a place."""
        from whiflash_kernels.triton_kernels import verify

        qo, kv = (integers([0, *accumulate(n)]) for n in ((width,) * len(lengths), lengths))
        with cut("triton", 132 * verify.PROGRAMS_PER_MULTIPROCESSOR // 8, verify.FEWEST_KEYS):
            programs, spans, _ = verify._planned(qo, kv, None, width, 4, 8, 64, verify.KEYS)
        read = [[] for _ in lengths]
        loads = []
        for first, behind, opens, closes in programs.tolist():
            loads.append(0)
            for request in range(first, behind):
                start, end, cuts = spans[request].tolist()
                steps = range(start, end) if cuts < 0 else range(max(opens, start), min(closes, end))
                read[request] += steps
                loads[-1] += len(steps) * verify.KEYS
        for (start, end, cuts), steps in zip(spans.tolist(), read, strict=True):
            assert steps == list(range(start, end))
            assert cuts < 0 or (end - start - 1) * verify.KEYS > verify.FEWEST_KEYS
        assert max(loads) == busiest

    def test_layers_share_a_plan(self) -> None:
        from whiflash_kernels.triton_kernels import verify

        batch = Batch((5, 1, 3), (300, 2, 90))
        with cut("triton", 9, 64), mock.patch.object(verify, "_planned", wraps=verify._planned) as planned:
            batch.check("triton", {}, layers=3)
            assert planned.call_count == 1

    def test_a_program_merges_several_requests(self) -> None:
        with cut("triton", 40, 64):
            Batch((1, 2) * 5, (130,) * 10).check("triton")


def test_rejects_what_does_not_fit() -> None:
    q, k, pool = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8), torch.zeros(9, 2, 8)
    offsets = torch.tensor([0, 4])

    def attend(q=q, k=k, v=k, out=q, k_pool=pool, v_pool=pool, kv=offsets, most=4, sinks=None):
        verify_attention(q, k, v, out, k_pool, v_pool, offsets, kv, offsets, most=most, scale=1.0, sinks=sinks)

    attend()
    for error, wrong in {
        "most must be": {"most": 0},
        "and out the same": {"out": q[:3]},
        "k and v must": {"v": k[:, :1]},
        "pools must": {"v_pool": pool.to(torch.uint8)},
        "must be \\[B": {"kv": offsets[:1]},
        "sinks must": {"sinks": q[0, :3, 0]},
        "last dimension": {"k_pool": torch.zeros(9, 8, 2).transpose(1, 2)},
    }.items():
        with pytest.raises(ValueError, match=error):
            attend(**wrong)
