"""The model of streams: what CUDA may reorder is a race, what it may not is none."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from streams import Streams
from watching import watching


@pytest.fixture
def world() -> Iterator[Streams]:
    streams = Streams()
    with streams.installed(), watching(streams):
        yield streams


def two() -> tuple[Any, Any]:
    first, second = torch.cpu.Stream(), torch.cpu.Stream()
    first.name, second.name = "a", "b"
    return first, second


def device(*values: float) -> torch.Tensor:
    return torch.tensor(values, device="cpu:0")


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
    shared, event = device(1.0, 2.0), torch.cpu.Event()
    for stream in (a, b):
        stream.wait_stream(torch.cpu.current_stream())
    with torch.cpu.stream(a):
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
    with torch.cpu.stream(b):
        second(shared[1:])  # a view of it is the same memory
    found = {text.split(",")[0] for text in world.races}
    assert found == ({race} if race and order in ("none", "an event too early") else set())


def test_what_is_copied_to_the_host_comes_late(world: Streams) -> None:
    a, _ = two()
    source, done = device(1.0, 2.0), torch.cpu.Event()
    a.wait_stream(torch.cpu.current_stream())
    with torch.cpu.stream(a):
        host = world.async_d2h(source)
        done.record()
    assert not done.query()
    assert host.isnan().all()
    assert {text.split(",")[0] for text in world.races} == {"host reads what a wrote"}
    world.races.clear()
    done.synchronize()
    assert done.query()
    assert host.tolist() == [1.0, 2.0]
    assert not world.races


@pytest.mark.parametrize("kept", ["not", "by the owner's wait", "by record_stream", "until the owner waits"])
@pytest.mark.parametrize("use", [read, write])
def test_memory_that_is_freed_goes_back_to_its_stream(world: Streams, use: Any, kept: str) -> None:
    """The next operator that gets memory may write to it while another stream still uses it."""
    a, b = two()
    with torch.cpu.stream(a):
        held = [torch.zeros(2, device="cpu:0") + 1]
    b.wait_stream(a)
    with torch.cpu.stream(b):
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
    staged = torch.zeros(3, pin_memory=False)
    staged[0] = 1.0
    a, _ = two()
    with torch.cpu.stream(a):
        plan = staged.to("cpu:0", non_blocking=True)
    staged[0] = 2.0
    assert {text.split(",")[0] for text in world.races} == {"host writes what a reads"}
    assert plan[0] == 1.0, "a copy, as on a GPU"


def test_a_read_by_the_host_waits_for_the_current_stream_alone(world: Streams) -> None:
    a, b = two()
    shared = device(1.0)
    a.wait_stream(torch.cpu.current_stream())
    with torch.cpu.stream(a):
        write(shared)
    with torch.cpu.stream(b):
        shared.tolist()
    assert {text.split(",")[0] for text in world.races} == {"b reads what a wrote"}
    world.races.clear()
    with torch.cpu.stream(a):
        shared.tolist()
    write(shared)
    assert not world.races
    assert sum(world.stalls.values()) == 2
