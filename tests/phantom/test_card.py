"""The phantom card's rules, each broken once, and the model of streams: what CUDA may reorder is a race."""

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


def two() -> tuple[Any, Any]:
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    first.name, second.name = "a", "b"
    return first, second


def read(x: torch.Tensor) -> None:
    x.add(1)


def write(x: torch.Tensor) -> None:
    x.add_(1)


@pytest.mark.parametrize(
    ("first", "second", "race"),
    [
        (read, read, None),
        (read, write, "b writes what a reads"),
        (write, read, "b reads what a wrote"),
        (write, write, "b writes what a wrote"),
    ],
)
@pytest.mark.parametrize("order", ["none", "stream", "event", "an event too early", "the host"])
def test_two_streams(world: Streams, first: Any, second: Any, race: str | None, order: str) -> None:
    a, b = two()
    shared, event = torch.ones(2, device=CUDA), torch.cuda.Event()
    for stream in (a, b):
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(a):
        if order == "an event too early":
            event.record()
        first(shared)
        if order != "an event too early":
            event.record()
    if order == "stream":
        b.wait_stream(a)
    elif "event" in order:
        event.wait(b)
    elif order == "the host":
        event.synchronize()
    with torch.cuda.stream(b):
        second(shared[1:])  # a view of it is the same memory
    found = {text.split(",")[0] for text in world.races}
    assert found == ({race} if race and order in ("none", "an event too early") else set())


@pytest.mark.parametrize("kept", ["not", "by the owner's wait", "by record_stream", "until the owner waits"])
@pytest.mark.parametrize("use", [read, write])
def test_memory_that_is_freed_goes_back_to_its_stream(world: Streams, use: Any, kept: str) -> None:
    """The next operator that gets memory may write to it while another stream still uses it."""
    a, b = two()
    with torch.cuda.stream(a):
        held = [torch.zeros(2, device=CUDA) + 1]
    b.wait_stream(a)
    with torch.cuda.stream(b):
        use(held[0])
    if kept == "by the owner's wait":
        a.wait_stream(b)
    elif kept == "by record_stream":
        held[0].record_stream(b)
    elif kept == "until the owner waits":
        held[0] = held[0][1:]
        a.wait_stream(b)
    held.clear()
    b.synchronize()  # too late for its owner
    races = [text for text in world.races if "a may write again what b uses" in text]
    assert len(races) == len(world.races) == (kept == "not")


def test_a_pinned_buffer_must_not_be_filled_again_too_early(world: Streams) -> None:
    staged, (a, _) = torch.ones(3, pin_memory=True), two()
    with torch.cuda.stream(a):
        plan = staged.to(CUDA, non_blocking=True)
    staged[0] = 2.0
    assert {text.split(",")[0] for text in world.races} == {"host writes what a reads"}
    assert plan[0] == 1.0


def test_a_read_by_the_host_waits_for_the_current_stream_alone(world: Streams) -> None:
    a, b = two()
    shared = torch.ones(1, device=CUDA)
    a.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(a):
        write(shared)
    with torch.cuda.stream(b):
        shared.tolist()
    assert {text.split(",")[0] for text in world.races} == {"b reads what a wrote"}
    world.races.clear()
    with torch.cuda.stream(a):
        shared.tolist()
    write(shared)
    assert not world.races
    assert sum(world.stalls.values()) == 2


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
