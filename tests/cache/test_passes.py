"""A draft pass is a function of tensors: it reads none of them on the host, so that a captured one stays right."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from host_reads import HostReads
from replay import CONTEXT, SLOTS, VOCAB, Arms
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from whiflash_kernels.structs import PADDING

from whiflash_sglang.arms.paged import PagedArm
from whiflash_sglang.records.core import DraftBatch

Drafted = tuple[torch.Tensor, torch.Tensor]

ROWS = 4
ARMS = ["ar", "diffusion"]


@pytest.fixture(autouse=True)
def prepared(arms: Arms) -> Iterator[None]:
    """Entries of every slot; without gradients, as the worker's rounds are."""
    generator = torch.Generator().manual_seed(3)
    for arm in arms.by_name.values():
        for pool in (arm.kv.k, arm.kv.v):
            pool.copy_(torch.randn(pool.shape, generator=generator))
    with torch.no_grad():
        yield


def requests(arm: PagedArm, lengths: Sequence[int], seed: int = 0) -> DraftBatch:
    """Requests of the first rows of a random slot table; row 0 and slot 0 are the padding's."""
    generator, count = torch.Generator().manual_seed(seed), len(lengths)
    slots = torch.randperm(SLOTS - 1, generator=generator)[: ROWS * CONTEXT] + 1
    rows = torch.arange(1, count + 1)
    return DraftBatch(
        rows,
        torch.tensor(lengths),
        torch.randint(VOCAB, (count,), generator=generator),
        torch.randn(count, arm.tail_width, generator=generator),
        torch.cat([torch.zeros(CONTEXT), slots]).view(ROWS + 1, CONTEXT).int(),
        max(lengths),
        caps=torch.full_like(rows, arm.max_drafts),
    )


def tensors_of(batch: DraftBatch) -> list[torch.Tensor]:
    """Tensors that a pass reads."""
    return [batch.rows, batch.starts, batch.bonus, batch.tail, batch.slot_table]


def with_tensors(batch: DraftBatch, tensors: Sequence[torch.Tensor], longest: int) -> DraftBatch:
    return DraftBatch(*tensors, longest, batch.caps)


def faked(batch: DraftBatch, mode: FakeTensorMode) -> DraftBatch:
    return with_tensors(batch, [mode.from_tensor(tensor) for tensor in tensors_of(batch)], batch.longest)


def drafted(arm: PagedArm, given: DraftBatch) -> Drafted:
    """The whole pass: tokens and confidences, [G, drafts] each."""
    return arm.whole(given, arm.max_drafts)


@pytest.mark.parametrize("name", ARMS)
def test_nothing_is_read_and_nothing_uploaded(arms: Arms, name: str) -> None:
    arm, given = arms.by_name[name], requests(arms.by_name[name], [20, 7, 90])
    with HostReads() as seen:
        drafted(arm, given)
    assert (seen.reads, seen.uploads) == ({}, {})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens, confidences = drafted(arm, faked(given, mode))
    assert tokens.shape == confidences.shape == (3, arm.max_drafts)


@pytest.mark.parametrize("name", ARMS)
def test_recorded_operators_serve_other_requests(arms: Arms, name: str) -> None:
    """As a graph does: recorded once for a group size, replayed with other values in the same tensors."""
    arm, first = arms.by_name[name], requests(arms.by_name[name], [20, 7, 90])
    replay = recorded(arm, first)
    for seed, lengths in enumerate([(1, 2, 3), (120, 60, 9), (20, 7, 90)], 1):
        other = requests(arm, lengths, seed)
        before = (arm.kv.k.clone(), arm.kv.v.clone())
        found = replay(*tensors_of(other))
        written = (arm.kv.k.clone(), arm.kv.v.clone())
        arm.kv.k.copy_(before[0])
        arm.kv.v.copy_(before[1])
        expected = drafted(arm, other)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
        torch.testing.assert_close(written, (arm.kv.k, arm.kv.v))


def recorded(arm: PagedArm, given: DraftBatch) -> Callable[..., Drafted]:
    """The pass as the list of operators that it issued for `given`."""
    kept = (arm.kv.k.clone(), arm.kv.v.clone())
    graph = make_fx(lambda *tensors: drafted(arm, with_tensors(given, tensors, CONTEXT)))(*tensors_of(given))
    arm.kv.k.copy_(kept[0])
    arm.kv.v.copy_(kept[1])
    return graph


@pytest.mark.parametrize("name", ARMS)
def test_padding_changes_nothing(arms: Arms, name: str) -> None:
    """A group may be padded to the size of a graph, whatever slot 0 holds."""
    arm, given = arms.by_name[name], requests(arms.by_name[name], [20, 7, 90])
    kept = (arm.kv.k.clone(), arm.kv.v.clone())
    expected = drafted(arm, given)
    alone = (arm.kv.k[:, 1:].clone(), arm.kv.v[:, 1:].clone())
    for pool, values in zip((arm.kv.k, arm.kv.v), kept, strict=True):
        pool.copy_(values)
        pool[:, 0] = torch.nan
    found = drafted(arm, padded(given, 8))
    assert torch.equal(found[0][:3], expected[0])
    torch.testing.assert_close(found[1][:3], expected[1])
    assert not any(tensor.isnan().any() for tensor in found)
    torch.testing.assert_close((arm.kv.k[:, 1:], arm.kv.v[:, 1:]), alone)


def padded(given: DraftBatch, size: int) -> DraftBatch:
    more = size - len(given.rows)
    return replace(
        given,
        rows=torch.cat([given.rows, given.rows.new_zeros(more)]),
        starts=torch.cat([given.starts, given.starts.new_full((more,), PADDING)]),
        bonus=torch.cat([given.bonus, given.bonus.new_zeros(more)]),
        tail=torch.cat([given.tail, given.tail.new_zeros(more, given.tail.shape[1])]),
    )
