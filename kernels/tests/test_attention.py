"""draft_attention against a float64 oracle, whatever a pool holds where nobody looks."""

from dataclasses import dataclass

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, DEVICE, examples, guarded_outputs, running, watched_merges
from kernel_tolerances import assert_close
from whiflash_kernels import attention, draft_attention
from whiflash_kernels.cpu.paged_attention import compiled_attention
from whiflash_kernels.verify import EIGHT_BITS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Batch:
    """Random requests over one pool; slots that no request owns hold NaN."""

    seq_lens: tuple[int, ...]
    extra: int
    width: int
    causal: bool
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    pool: torch.dtype | None = None
    context: int = 200
    wide_values: bool = False
    """V is a part of wider rows, with other strides than K."""

    def check(self, backend: str) -> None:
        generator = torch.Generator().manual_seed(sum(self.seq_lens) + self.width)
        requests, rows = len(self.seq_lens), len(self.seq_lens) + 1
        table = torch.randperm(rows * self.context, generator=generator).view(rows, self.context).int()
        request_slots = torch.randperm(rows, generator=generator)[:requests]
        k, v = (torch.full((rows * self.context, self.kv_heads, self.dim), float("nan")) for _ in range(2))
        ends = [length + self.extra for length in self.seq_lens]
        for slot, end in zip(request_slots.tolist(), ends, strict=True):
            for pool in (k, v):
                own = table[slot, : max(end, 0)].long()
                pool[own] = torch.randn(len(own), self.kv_heads, self.dim, generator=generator)
        q = torch.randn(requests * self.width, self.heads, self.dim, generator=generator)
        if self.wide_values:
            v = torch.nn.functional.pad(v, (0, 4, 0, 1), value=float("nan"))[:, :-1, :-4]
        q, k, v = (
            tensor.to(dtype).to(DEVICE)
            for tensor, dtype in zip((q, k, v), (self.dtype, *[self.pool or self.dtype] * 2), strict=True)
        )
        scale = self.dim**-0.5
        expected = oracles.draft_attention(
            q, k, v, table, request_slots.tolist(), ends, self.width, self.causal, scale, self.window
        )
        with running(backend), guarded_outputs():
            out = draft_attention(
                q,
                k,
                v,
                table.to(DEVICE),
                request_slots.to(DEVICE),
                torch.tensor(self.seq_lens, dtype=torch.int32, device=DEVICE),
                extra=self.extra,
                width=self.width,
                causal=self.causal,
                scale=scale,
                window=self.window,
            )
        assert out.dtype == self.dtype
        assert_close(out, expected, "attention", self.dtype)


BOTH = (True, False)
BATCHES = [
    *(Batch((5, 131, 64, 1), n, n, causal, dtype=t) for n in (1, 3, 8) for causal in BOTH for t in DTYPES),
    *(
        Batch((70, 9), 4, 4, False, heads, kv_heads, dim)
        for heads, kv_heads, dim in ((9, 3, 64), (1, 1, 8), (8, 1, 40), (6, 6, 16), (20, 1, 320))
    ),
    Batch((70, 9), 4, 4, True, wide_values=True),
    *(Batch((70, 9), 4, 4, causal, dtype=t, pool=EIGHT_BITS[0]) for causal in BOTH for t in DTYPES),
    Batch((77, 3), 17, 17, True, heads=8, kv_heads=1),  # rows of several tiles
    *(Batch((150, 2), 5, 5, causal, window=n) for n in (0, 1, 63, 64, 500) for causal in BOTH),
    *(Batch(lengths, 4, 4, causal) for lengths in ((12, -4, 0), (-4, -9)) for causal in BOTH),  # padding
    *(Batch((40, 7), 1 + step, 1, True) for step in range(3)),  # a chain's
]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_batches(backend: str, batch: Batch) -> None:
    batch.check(backend)


def test_rows_of_one_request_may_stand_for_requests_of_their_own(backend: str) -> None:
    """So a catch-up attends, whose rows the device alone knows: each up to itself, padding to nothing."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(count, heads, 16, generator=generator).to(DEVICE) for count, heads in ((7, 4), (400, 2), (400, 2))
    )
    table = torch.randperm(400, generator=generator).view(2, 200).int().to(DEVICE)
    last = torch.tensor([90, 91, 92, 93, 4, 5, 0], device=DEVICE)
    owners = torch.tensor([1, 1, 1, 1, 0, 0, 1], device=DEVICE)
    given = {"extra": 0, "causal": True, "scale": 0.25}
    with running(backend), guarded_outputs():
        alone = draft_attention(q, k, v, table, owners, last, width=1, **given)
        runs = [
            draft_attention(
                q[begin:end], k, v, table, owners[end - 1 : end], last[end - 1 : end], width=end - begin, **given
            )
            for begin, end in ((0, 4), (4, 6))
        ]
    assert_close(alone[:6], torch.cat(runs), "attention", torch.float32)
    assert not alone[6].any()


def test_no_requests(backend: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    pool = torch.zeros(4, 1, 8, device=DEVICE)
    table = torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
    q = torch.zeros(0, 2, 8, device=DEVICE)
    with running(backend):
        out = draft_attention(q, pool, pool, table, empty, empty, extra=1, width=1, causal=True, scale=1.0)
    assert out.shape == (0, 2, 8)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the kernel is a CPU's")
@pytest.mark.parametrize("window", [None, 0, 63, 500])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_that_targets_attend_by(
    causal: bool, window: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kernel = compiled_attention(tmp_path_factory.getbasetemp().parent / "compiled")
    calls = []

    class Watched:
        def draft(self, *arguments):
            calls.append(arguments)
            return kernel.draft(*arguments)

    try:
        attention.use(Watched())
        Batch((150, 2, -9, 64, 0), 5, 5, causal, window=window, dtype=torch.bfloat16).check("torch")
        Batch((-4, -9), 4, 4, causal, window=window, dtype=torch.bfloat16).check("torch")
        assert len(calls) == 2
    finally:
        attention.use(None)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
class TestTritonShares:
    """Long requests are cut by the lengths that the device has; what is cut, and for whom, does not show."""

    @pytest.mark.parametrize("shares", [1, 2, 8, 100])
    @pytest.mark.parametrize("dim", [16, 320])
    def test_do_not_show(self, shares: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from whiflash_kernels.triton_kernels import attention as kernels

        monkeypatch.setattr(kernels, "shares_for", lambda *_: shares)
        lengths = (1, 64, 190, -4) if dim > 16 else (0, 1, 63, 64, 65, 190, -4)
        Batch(lengths, extra=3, width=3, causal=True, dim=dim).check("triton")

    @pytest.mark.parametrize(("window", "shares"), [(None, 17), (1000, 4)])
    def test_one_long_request_beside_short_ones(
        self, window: int | None, shares: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It alone is cut, into shares of 256 of the entries that it sees, and only these leave sums."""
        from whiflash_kernels.triton_kernels import attention as kernels

        monkeypatch.setattr(kernels, "FEWEST_ENTRIES", 256)
        with watched_merges() as merges:
            Batch((40, 4096, 0, 63, 64, 65), 4, 4, False, kv_heads=1, window=window, context=4200).check("triton")
        ((cut, partial),) = merges
        assert cut == [(1, 0, shares)]
        assert int((~partial.isnan().any(1)).sum()) == shares * 4 * 4

    def test_what_is_short_is_not_cut(self) -> None:
        with watched_merges() as merges:
            Batch((60, 1, 0, -4, 61), 3, 3, True, context=4200).check("triton")
        ((cut, partial),) = merges
        assert cut == []
        assert partial.isnan().all()


@settings(max_examples=examples(40), deadline=None)
@given(
    seq_lens=st.lists(st.integers(-9, 400), min_size=1, max_size=6),
    width=st.integers(1, 9),
    ahead=st.integers(0, 6),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 300),
)
def test_any_batch(backend: str, seq_lens: list[int], width: int, ahead: int, causal: bool, window: int | None) -> None:
    Batch(tuple(seq_lens), width + ahead, width, causal, window=window, context=420).check(backend)


def test_rejects_what_does_not_fit() -> None:
    q, pool = torch.zeros(4, 4, 8), torch.zeros(9, 2, 8)
    table, one = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)

    def attend(q=q, k=pool, v=pool, lens=one, width=2):
        return draft_attention(q, k, v, table, one, lens, extra=2, width=width, causal=True, scale=1.0)

    attend()
    for error, wrong in (
        ("width must be", {"width": 0}),
        ("q must be", {"q": q[:3]}),
        ("q must be", {"lens": one[:1]}),
        ("k and v must both", {"v": pool[:, :1]}),
        ("k and v must both", {"k": torch.zeros(9, 3, 8), "v": torch.zeros(9, 3, 8)}),
        ("contiguous", {"q": torch.zeros(4, 8, 4).transpose(1, 2)}),
    ):
        with pytest.raises(ValueError, match=error):
            attend(**wrong)
