"""The phantom card's rules, each broken once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from streams import Streams

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "mix",
    [
        lambda card, host: card + host,
        lambda card, host: torch.cat([card, host]),
        lambda card, host: card.index_copy_(0, torch.arange(3), card),
        lambda card, host: torch.where(host > 0, card, card),
    ],
)
def test_a_tensor_of_the_host_is_refused(world: Streams, mix: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, device=CUDA), torch.ones(3))


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist(),
        lambda t: t[0].item(),
        lambda t: t.cpu(),
        lambda t: torch.empty(3, dtype=torch.int64).copy_(t, non_blocking=True),
        lambda t: t[t > 1],
        lambda t: t.nonzero(),
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
        lambda there: torch.tensor([1, 2]).to(CUDA, non_blocking=True),
        lambda there: torch.empty(2, pin_memory=True).to(CUDA),
        lambda there: there.copy_(torch.tensor([1, 2])),
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


def test_a_replay_spoils_what_graphs_captured_later_hold(world: Streams) -> None:
    given, pool = torch.ones(2, device=CUDA), torch.cuda.graph_pool_handle()
    graphs, results = [], []
    for shared in (pool, pool, None):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=shared):
            results.append(given + 1)
        graphs.append(graph)
    first, second, other = graphs
    for graph in (second, other, first):
        graph.replay()
    assert [bool(result.cpu().isnan().all()) for result in results] == [False, True, False]
    second.replay()
    assert [result.tolist() for result in results] == [[2, 2]] * 3


def test_memory_that_a_graph_alone_uses_is_named(world: Streams) -> None:
    held, dropped, graph = torch.ones(2, device=CUDA), torch.ones(2, device=CUDA), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _ = (held + 1) * dropped
    del dropped
    (where,) = torch.cuda.CUDAGraph.dangling()  # type: ignore[attr-defined]
    assert where.startswith("test_card.py")


def test_nothing_is_left_of_it() -> None:
    assert not torch.cuda.is_available()
