"""The phantom card's rules, each broken once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from card import Card
from streams import Streams

from whiflash_sglang.device.clock import EventClock, clock_of

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="cuda"),
        lambda: torch.zeros(2, 3, device=CUDA),
        lambda: torch.full((3,), 7, device="cuda:0"),
        lambda: torch.arange(4, device=CUDA),
        lambda: torch.randn(4, device=CUDA),
        lambda: torch.tensor([1, 2], device=CUDA),
        lambda: torch.as_tensor(np.arange(3), device=CUDA),
        lambda: torch.ones(3).to(CUDA),
        lambda: torch.ones(3).cuda(),
        lambda: torch.zeros_like(torch.ones(3), device=CUDA),
        lambda: torch.nn.Linear(2, 3).to(CUDA).weight,
    ],
)
def test_what_is_made_there_is_there(world: Streams, make: Callable[[], torch.Tensor]) -> None:
    made = make()
    assert isinstance(made, Card)
    assert made.device == torch.device("cuda", 0)
    assert made.is_cuda
    for derived in (made + 1, made.view(-1), made.new_empty(5), torch.empty_like(made), made.float().sum()):
        assert derived.is_cuda
    assert not made.cpu().is_cuda


def test_views_share_memory_and_writes_keep_the_tensor(world: Streams) -> None:
    a = torch.zeros(2, 3, device=CUDA)
    assert a.add_(1) is a
    a[0].fill_(5)
    a[:, 1:].mul_(2)
    assert a.tolist() == [[5, 10, 10], [1, 2, 2]]
    a[1, 0] = 9
    assert int(a[1, 0]) == 9


@pytest.mark.parametrize(
    "mix",
    [
        lambda card, host: card + host,
        lambda card, host: card.add_(host),
        lambda card, host: host.add_(card),
        lambda card, host: torch.cat([card, host]),
        lambda card, host: host[card.long()],
        lambda card, host: card.index_copy_(0, torch.arange(3), card),
        lambda card, host: card.gather(0, torch.arange(3)),
        lambda card, host: card @ host,
        lambda card, host: card.__setitem__(torch.arange(3), host),
        lambda card, host: torch.where(host > 0, card, card),
        lambda card, host: torch.cat([card, host.sum()[None]]),
        lambda card, host: host.sum().add_(card.sum()),
    ],
)
def test_a_tensor_of_the_host_is_refused(world: Streams, mix: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, device=CUDA), torch.ones(3))


@pytest.mark.parametrize(
    "mix",
    [
        lambda card, number: card + number,
        lambda card, number: card.mul_(number),
        lambda card, number: torch.where(card > 0, card, number),
        lambda card, number: card.masked_fill_(card > 0, number),
    ],
)
def test_a_number_of_the_host_is_taken(world: Streams, mix: Callable[..., Any]) -> None:
    assert mix(torch.ones(3, device=CUDA), torch.tensor(2.0)).is_cuda
    assert not world.stalls
    assert not world.pageable


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist(),
        lambda t: t[0].item(),
        lambda t: bool(t[0]),
        lambda t: int(t[0]),
        lambda t: range(t[0]),
        lambda t: 3 in t,
        lambda t: t.cpu(),
        lambda t: t.to("cpu"),
        lambda t: t.numpy(force=True),
        lambda t: torch.empty(3, dtype=torch.int64).copy_(t, non_blocking=True),
        lambda t: torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(t),
        lambda t: t[t > 1],
        lambda t: t.__setitem__(t > 1, t[:1]),
        lambda t: t.nonzero(),
        lambda t: torch.where(t > 1),
        lambda t: t.masked_select(t > 1),
        lambda t: t.unique(),
        lambda t: t.bincount(),
        lambda t: torch.equal(t, t),
        lambda t: t.repeat_interleave(t),
    ],
)
def test_a_read_by_the_host_is_seen(world: Streams, read: Callable[[torch.Tensor], Any]) -> None:
    t = torch.arange(3, device=CUDA)
    torch.where(t > 1, t, 0)
    t.masked_fill_(t > 1, 2)
    t[t > 1] = 2
    t.repeat_interleave(2)
    t.repeat_interleave(t, output_size=3)
    assert not world.stalls
    read(t)
    assert sum(world.stalls.values()) >= 1
    assert all("test_card.py" in site for site in world.stalls)


@pytest.mark.parametrize(
    "send",
    [
        lambda there: torch.tensor([1, 2], device=CUDA),
        lambda there: torch.as_tensor([1, 2], device=CUDA),
        lambda there: torch.tensor([1, 2]).to(CUDA),
        lambda there: torch.tensor([1, 2]).to(CUDA, non_blocking=True),
        lambda there: torch.empty(2, pin_memory=True).to(CUDA),
        lambda there: there.copy_(torch.tensor([1, 2])),
        lambda there: there.copy_(torch.tensor(1)),
        lambda there: there.__setitem__(slice(2), torch.tensor([1, 2])),
        lambda there: there[torch.tensor([0, 1])],
        lambda there: there.__setitem__(0, 3),  # of equal shapes, so it is copied and not filled
    ],
)
def test_a_copy_for_which_the_host_waits_is_seen(world: Streams, send: Callable[[torch.Tensor], Any]) -> None:
    there = torch.zeros(2, dtype=torch.int64, device=CUDA)
    there[:] = 3
    there.copy_(torch.zeros(2, dtype=torch.int64, pin_memory=True), non_blocking=True)
    there.copy_(torch.zeros(2, dtype=torch.int64).pin_memory(), non_blocking=True)
    torch.empty(2, pin_memory=True).to(CUDA, non_blocking=True)
    assert not world.pageable
    send(there)
    assert sum(world.pageable.values()) == 1
    assert not world.stalls


def test_a_copy_that_does_not_wait_arrives_when_the_host_has(world: Streams) -> None:
    source = torch.arange(3.0, device=CUDA)
    host, done = source.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()
    assert host.is_pinned()
    assert host.isnan().all()
    assert world.races
    world.races.clear()
    done.synchronize()
    assert host.tolist() == [0, 1, 2]
    assert not world.races
    assert not world.stalls


def test_streams_have_no_order_but_what_is_waited_for(world: Streams) -> None:
    other = torch.cuda.Stream()
    shared = torch.zeros(3, device=CUDA)
    with torch.cuda.stream(other):
        shared.add_(1)
    assert {text.split(",")[0] for text in world.races} == {"stream 1 writes what stream of the start wrote"}
    world.races.clear()
    torch.cuda.current_stream().wait_stream(other)
    shared.add_(1)
    assert not world.races
    with torch.cuda.stream(other):
        shared.record_stream(other)


def test_marks_in_time_are_events(world: Streams) -> None:
    clock = clock_of(torch.zeros(1, device=CUDA).device)
    assert isinstance(clock, EventClock)
    begin = clock.record()
    torch.zeros(3, device=CUDA).add_(1)
    end = clock.record()
    assert not clock.passed(end)
    with pytest.raises(RuntimeError, match="not ready"):
        clock.elapsed(begin, end)
    clock.wait(end)
    assert clock.passed(end)
    assert clock.elapsed(begin, end) >= 0


def test_the_card_is_an_h100(world: Streams) -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.get_device_properties(0).multi_processor_count == 132


def test_nothing_is_left_of_it() -> None:
    assert not torch.cuda.is_available()
