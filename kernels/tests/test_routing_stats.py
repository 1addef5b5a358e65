"""routing_stats against a float64 oracle."""

from unittest import mock

import kernel_oracles as oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import BACKENDS, DEVICE, examples, guarded_outputs, running
from kernel_tolerances import assert_close
from whiflash_kernels import routing_stats

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_logits(rows: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100_003 + vocab)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype).to(DEVICE)


def check(stats: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
    entropies, top1, argmax = stats
    entropy, likeliest, first = zip(*(oracles.routing_stats(row) for row in logits), strict=True)
    assert_close(entropies, torch.tensor(entropy), "entropy", torch.float32)
    assert_close(top1, torch.tensor(likeliest), "probability", torch.float32)
    assert argmax.tolist() == list(first)
    assert [field.dtype for field in stats] == [torch.float32] * 2 + [torch.int64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 2), (3, 5), (2, 4096), (2, 4097), (256, 33), (1, 151_936)])
def test_random_logits(backend: str, dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits = random_logits(rows, vocab, dtype)
    before = logits.clone()
    with running(backend), guarded_outputs():
        stats = routing_stats(logits)
    check(stats, logits)
    assert torch.equal(logits, before)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("backend", ["triton"])
def test_rows_that_fill_the_chip_are_not_split(backend: str) -> None:
    from whiflash_kernels.triton_kernels import routing

    distinct = random_logits(4, 9008, torch.bfloat16)
    # Both leaders in the hands of one thread, in one tile or in two: its state decides, no merge does.
    near, far = 43, 43 + routing.LANES * 8
    leaders = distinct - 100
    leaders[0, [near, far]] = 5.0
    leaders[1, near], leaders[1, far] = 5.0, 4.0
    leaders[2, near], leaders[2, far] = 4.0, 5.0
    leaders[3, near], leaders[3, near + 1] = 4.0, 5.0
    with running(backend), mock.patch.object(routing, "multiprocessors", return_value=1):
        for logits in (distinct, leaders, (distinct / 3).round()):
            check(routing_stats(logits), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_first_as_in_torch(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randint(0, 3, (4, 9000), generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    with running(backend):
        stats = routing_stats(logits)
    check(stats, logits)
    assert torch.equal(stats[2].cpu(), logits.cpu().argmax(dim=-1))


def test_a_tie_of_neighbours(backend: str) -> None:
    """One thread loads both at once: no other has seen either of them."""
    logits = random_logits(1, 512, torch.bfloat16).clamp(max=1.0)
    logits[0, 41:43] = 5.0
    with running(backend):
        stats = routing_stats(logits)
    check(stats, logits)
    assert stats[2].tolist() == [41]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter's numpy; to -inf, as meant
def test_grammar_masks(backend: str) -> None:
    logits = random_logits(6, 5000, torch.bfloat16)
    logits[0, 1:] = -torch.inf  # one allowed token, the first
    logits[1, :-1] = -torch.inf  # one allowed token, the last
    logits[2, ::2] = -torch.inf
    logits[3] = -torch.inf  # nothing allowed
    logits[4, :4999] = torch.finfo(torch.bfloat16).min  # masked by the lowest value instead
    logits[5] = torch.finfo(torch.bfloat16).min
    with running(backend):
        stats = routing_stats(logits)
    check(stats, logits)
    assert stats[1][3] == 0
    assert stats[0][0] == 0
    assert stats[1][1] == 1


@pytest.mark.parametrize("offset", [-20_000.0, 0.0, 20_000.0])
def test_far_from_zero(backend: str, offset: float) -> None:
    logits = random_logits(2, 700, torch.float32) + offset
    with running(backend):
        check(routing_stats(logits), logits)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_chosen_rows_and_strided_logits(backend: str, index_dtype: torch.dtype) -> None:
    wide = random_logits(12, 6000, torch.bfloat16)
    logits = wide[::2, 7:5000]  # rows are strided and start off the 16-byte grid
    rows = torch.tensor([5, 0, 3, 3], dtype=index_dtype, device=DEVICE)
    with running(backend):
        check(routing_stats(logits, rows), logits[rows])
        check(routing_stats(logits, torch.stack([rows, rows], dim=1)[:, 0]), logits[rows])


def test_no_rows(backend: str) -> None:
    with running(backend):
        for stats in (
            routing_stats(torch.zeros(0, 9, device=DEVICE)),
            routing_stats(torch.zeros(3, 9, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)),
        ):
            assert [field.shape for field in stats] == [(0,)] * 3


def test_rejects_other_shapes_and_a_strided_vocabulary() -> None:
    for shape in ((9,), (2, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match="logits must be"):
            routing_stats(torch.zeros(shape, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous along the vocabulary"):
        routing_stats(torch.zeros(9, 2, device=DEVICE).t())


@settings(max_examples=examples(30), deadline=None)
@given(
    values=st.lists(
        st.one_of(st.just(-float("inf")), st.integers(-6, 6).map(float), st.floats(-80, 80, width=16)),
        min_size=1,
        max_size=90,
    )
)
def test_any_row(backend: str, values: list[float]) -> None:
    logits = torch.tensor([values], dtype=torch.float32, device=DEVICE)
    with running(backend):
        check(routing_stats(logits), logits)
