"""sample_rows against loops in float64, and the distribution of what it draws."""

import math
from collections import Counter
from itertools import accumulate

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import DEVICE, examples, guarded_outputs, integers, running
from whiflash_kernels import SamplingTable, sample_rows

FREE = (1.0, 2.0**30, 1.0, 0.0)
GREEDY = (1.0, 1.0, 1.0, 0.0)
KINDS = [
    FREE,
    GREEDY,
    (0.6, 2.0**30, 0.95, 0.0),
    (0.6, 20.0, 0.95, 0.0),
    (1.0, 3.0, 1.0, 0.0),
    (2.0, 2.0**30, 1.0, 0.2),
    (0.8, 3.0, 0.75, 0.05),
    (1.5, 2.0**30, 1e-6, 0.0),
    (0.8, 3.0, 0.75, -0.05),
    (0.8, 2.0**30, 0.7, -0.05),
    (0.8, 3.0, 1.0, -0.05),
    (2.0, 2.0**30, 1.0, -0.2),
]
SLOTS = 300


def table(parameters: list[tuple[float, ...]], slots: list[int], seeds: list[int]) -> SamplingTable:
    rows, own = torch.full((SLOTS, 4), math.nan), torch.zeros(SLOTS, dtype=torch.int64)
    rows[0] = 1.0
    for slot, values, seed in zip(slots, parameters, seeds, strict=True):
        rows[slot], own[slot] = torch.tensor(values), seed
    return SamplingTable(rows.to(DEVICE), own.to(DEVICE))


def bits(allowed: torch.Tensor) -> torch.Tensor:
    """[M, words] int32 of allowed [M, V]."""
    words = torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32)).view(len(allowed), -1, 32)
    values = (words.long() << torch.arange(32)).sum(2)
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)


def check(
    backend: str,
    widths: list[int],
    kinds: list[int],
    vocab: int,
    seed: int,
    *,
    nobody: bool = False,
    masked: bool = False,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
    coarse: bool = False,
) -> None:
    """Every row of a batch; ``coarse``: with many equal logits."""
    generator = torch.Generator().manual_seed(seed)
    count, rows = len(widths), sum(widths)
    logits = torch.randn(rows + padding, vocab, generator=generator) * 3
    logits = (logits.round() if coarse else logits).to(dtype)
    allowed = torch.rand(3, vocab, generator=generator) < 0.4
    allowed[0], allowed[:, vocab // 2] = True, True
    of_row = torch.randint(3, (rows + padding,), generator=generator)
    slots = (torch.randperm(SLOTS - 1, generator=generator)[:count] + 1).tolist()
    parameters, seeds = ([KINDS[kind] for kind in kinds], [(seed * 7 + (i << 60)) % (1 << 63) for i in range(count)])
    lengths = torch.randint(5, 90, (count,), generator=generator).tolist()
    own = table(parameters, slots, seeds)
    slots = [0] * count if nobody else slots
    indptr = [0, *accumulate(widths)]
    masks = (bits(allowed).to(DEVICE), of_row.to(DEVICE)) if masked else None
    before = logits.clone()
    batch = integers(indptr, torch.int32), integers(lengths), integers(slots)
    on_device = logits.to(DEVICE)
    with running(backend), guarded_outputs():
        tokens = sample_rows(on_device, *batch, own, masks=masks)
    assert torch.equal(on_device.cpu(), before)
    assert tokens.dtype == torch.int64
    for row, token in enumerate(tokens.tolist()):
        owner = next((i for i in range(count) if indptr[i] <= row < indptr[i + 1]), None)
        if owner is None or nobody:
            assert token == 0
            continue
        values = logits[row].float()
        if masked:
            values = values.masked_fill(~allowed[of_row[row]], -math.inf)
        position = lengths[owner] + row - indptr[owner]
        assert token in oracles.drawn(values, seeds[owner], position, *parameters[owner]), (row, owner)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coarse", [False, True])
def test_every_kind_of_request_in_one_batch(backend: str, masked: bool, coarse: bool) -> None:
    widths = [2, 1, 12, 12, 20, 12, 12, 2, 20, 3, 2, 12, 0]
    check(backend, widths, [*range(len(KINDS)), 0], 301, 3, masked=masked, padding=4, coarse=coarse)
    check(backend, [2, 1, 3], [0, 1, 2], 301, 4, masked=masked, padding=4, nobody=True)
    check(backend, [40], [len(KINDS) - 1], 301, 5, masked=masked, coarse=coarse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 2, 33, 4097, 9000])
def test_vocabularies_and_types(backend: str, dtype: torch.dtype, vocab: int) -> None:
    check(backend, [1, 1, 1], [2, 0, 1], vocab, vocab, dtype=dtype)


def test_more_is_kept_than_is_sorted_first(backend: str) -> None:
    """By its mass, and because so many tokens are equally likely."""
    flat = torch.zeros(1, 3000, device=DEVICE)
    for parameters in ((1.0, 2.0**30, 0.9, 0.0), (1.0, 5.0, 1.0, 0.0)):
        own = table([parameters], [5], [11])
        batch = integers([0, 1], torch.int32), integers([9]), integers([5])
        with running(backend):
            token = int(sample_rows(flat, *batch, own))
        assert token in oracles.drawn(flat[0].cpu(), 11, 9, *parameters)


def test_nothing_allowed_and_no_rows(backend: str) -> None:
    """Nor is a number anything but allowed."""
    own = table([FREE, GREEDY, KINDS[6], KINDS[8]], [1, 2, 3, 4], [1, 2, 3, 4])
    batch = integers([0, 1, 2, 3, 4], torch.int32), integers([4, 5, 6, 7]), integers([1, 2, 3, 4])
    with running(backend):
        assert sample_rows(torch.full((4, 70), -math.inf, device=DEVICE), *batch, own).tolist() == [0] * 4
        for number in (math.nan, math.inf):
            bad = torch.full((4, 70), number, device=DEVICE)
            assert all(0 <= token < 70 for token in sample_rows(bad, *batch, own).tolist())
            bad[:, 3:] = 1.0
            assert all(0 <= token < 70 for token in sample_rows(bad, *batch, own).tolist())
        assert sample_rows(torch.zeros(0, 70, device=DEVICE), *batch, own).shape == (0,)


@settings(max_examples=examples(20), deadline=None)
@given(data=st.data())
def test_any_batch(backend: str, data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    kinds = data.draw(st.lists(st.integers(0, len(KINDS) - 1), min_size=len(widths), max_size=len(widths)))
    vocab, seed = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 1 << 20))
    masked, coarse = data.draw(st.booleans()), data.draw(st.booleans())
    check(backend, widths, kinds, vocab, seed, masked=masked, coarse=coarse, padding=seed % 3)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_the_distribution_is_the_definitions(kind: str) -> None:
    """χ² of 4,000 draws each, over positions of one request and over requests at one position."""
    row, parameters = torch.linspace(2, -2, 12), KINDS[int(kind)]
    chances = oracles.kept(row, *parameters) if parameters[1] > 1 else {0: 1.0}
    total, count = sum(chances.values()), 4000
    logits = row.expand(count, -1).to(DEVICE)
    one = table([parameters], [1], [5])
    along = sample_rows(logits, integers([0, count], torch.int32), integers([0]), integers([1]), one)
    many = SamplingTable(
        torch.tensor([parameters] * (count + 1), device=DEVICE), torch.arange(count + 1, device=DEVICE)
    )
    starts = torch.full((count,), 77, device=DEVICE)
    each = torch.arange(count + 1, device=DEVICE)
    across = sample_rows(logits, each.int(), starts, each[1:], many)
    for tokens in (along, across):
        counts = Counter(tokens.tolist())
        assert set(counts) <= set(chances)
        expected = {token: count * chance / total for token, chance in chances.items()}
        statistic = sum((counts[token] - value) ** 2 / value for token, value in expected.items())
        freedom = len(expected) - 1
        assert statistic <= freedom + 4 * math.sqrt(2 * freedom) + 8, (statistic, freedom)


def test_rejects_masks_that_are_too_short() -> None:
    own = table([FREE], [1], [1])
    batch = integers([0, 1], torch.int32), integers([4]), integers([1])
    short = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), integers([0])
    with pytest.raises(ValueError, match="too short"):
        sample_rows(torch.zeros(1, 70, device=DEVICE), *batch, own, masks=short)
    with pytest.raises(ValueError, match="logits must be"):
        sample_rows(torch.zeros(70, device=DEVICE), *batch, own)
