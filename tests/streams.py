"""Streams, events and host copies on the CPU, as badly as CUDA allows: what is ordered is what was waited for.

`torch.cpu` has streams and events that do nothing, and runs every operator at once, so a missing wait changes no result
there. `Streams` keeps the order that the program asked for instead, by vector clocks: an operator happens on the
current stream; a stream's work is before another's only by an event or a wait, and before the host's only by a
synchronisation. Two accesses to one storage, one of them a write, without such an order between them are a race. A
program without races gives in *every* order that CUDA may choose what it gives in the order of its text, so one run
speaks for all schedules of it, the latest included. A copy to pinned memory is late in fact: it holds nonsense until
the host has waited for the copy, and then what the source holds at that moment.

The model places tensors so (a CPU tensor does not say where it would be on a GPU):

- host memory is what a factory makes that is told no device, or `"cpu"` in so many letters; pinned memory what one
  makes that is told `pin_memory`, be it true or false; everything else is the device's;
- `.cpu()`, `.tolist()`, `.item()`, a mask as an index and the like read the device: the host waits for the current
  stream (`stalls` counts them by line); of host memory they read what is there;
- what stands in for a kernel on the CPU (`KERNELS`) is one: what it reads is read by the current stream, nobody waits;
- `.to(device)` of host memory is a copy, as it is on a GPU, and a later write to its source may come too early;
- a copy from host memory that is not pinned waits for the stream (`pageable` counts these by line): a list that becomes
  a tensor of the device, `.to(device)` and an assignment are such copies;
- memory belongs to the stream that first wrote to it. When the last tensor that holds it is gone that stream may write
  to it again at once: whoever else uses it must be done by then as far as that stream has waited, or be a stream that
  `record_stream` has named.

Not seen: operators that are called outside of the modes, C++ that writes through a pointer, and memory that is freed
while a copy from it to pinned memory is under way (the copy holds it here).
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from sites import in_reference, site
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

HOST, PINNED = "host", "pinned"
KERNELS = ("whiflash_cpu/", "whiflash_kernels/reference/", "sglang/srt/mem_cache/memory_pool.py")
"""Files in which the CPU has Python in place of a kernel, as in the bodies of our ops; the last for `commit_lens`."""

D2H = (
    ("sglang.srt.utils.common", "async_d2h"),
    ("sglang.srt.managers.utils", "_async_d2h"),
    ("sglang.srt.layers.logprob_processor", "async_d2h"),
    ("whiflash_sglang.engine.forward.masks", "async_d2h"),
)

Clock = dict[str, int]
"""How far each agent (the host, or a stream) has come, as far as the owner of the clock has waited for it."""


class Access(NamedTuple):
    agent: str
    time: int
    site: str

    def is_before(self, clock: Clock) -> bool:
        return self.time <= clock.get(self.agent, 0)


@dataclass(slots=True)
class Cell:
    """A storage's last accesses. place: `HOST`, `PINNED` or None, the device. owner: the stream that it belongs to.
    recorded: others for which it is kept.
    """

    alive: StorageWeakRef
    owner: str | None = None
    recorded: frozenset[str] = frozenset()
    place: str | None = None
    written: Access | None = None
    read: dict[str, Access] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """A copy to pinned memory that the host has not waited for."""

    to: torch.Tensor
    source: torch.Tensor
    access: Access


class Awaited:
    """A stream or an event: work that the host may wait for."""

    world: "Streams"
    clock: Clock

    def synchronize(self) -> None:
        if self.world.waits("host", self):
            self.world.waits_of_host[site()] += 1
            self.world.host_waits(self.clock)

    def query(self) -> bool:
        return all(time <= self.world.host.get(agent, 0) for agent, time in self.clock.items())


class Stream(Awaited):
    """In place of `torch.cpu.Stream`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.name = f"stream {len(self.world.streams)}"
        self.world.streams.append(self)
        self.clock = dict(self.world.host)

    def wait_stream(self, other: Any) -> None:
        if self.world.waits(self, other):
            _join(self.clock, self.world.clock_of(other))

    def wait_event(self, event: Any) -> None:
        if self.world.waits(self, event):
            _join(self.clock, event.clock)

    def record_event(self, event: Any = None) -> Any:
        event = event or torch.cpu.Event()
        event.record(self)
        return event


class Event(Awaited):
    """In place of `torch.cpu.Event`: what had been issued on a stream when it was recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.clock = {}
        self.name = "event"
        self._timed, self._at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        stream = stream or torch.cpu.current_stream()
        self._at = perf_counter()
        self.name = f"event of {self.world.name_of(stream)}"
        self.clock = dict(self.world.clock_of(stream))

    def wait(self, stream: Any = None) -> None:
        (stream or torch.cpu.current_stream()).wait_event(self)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds of the host between the two; as on a card only of what is timed and done."""
        if not (self._timed and end._timed):
            raise ValueError("both events must be made with enable_timing=True")
        if not (self.query() and end.query()):
            raise RuntimeError("device not ready: the host has not waited for both events")
        return 1000 * (end._at - self._at)


class Streams:
    """The model. `races`: what was not ordered. `stalls`: where the host waited for the device to read from it.
    `pageable`: where it waited to write to it. `uploads`: where it sent pinned memory, for which it does not wait.
    `waits_of_host`: where it was made to wait for a stream or an event. `read_by_kernels`: where stand-ins read.

    forget: says of a wait, by who waits and for what (`"host"`, a `Stream` or an `Event`), whether to leave it out: a
    planted fault.
    """

    def __init__(self) -> None:
        self.host: Clock = {"host": 0}
        self.streams: list[Stream] = []
        self.races: Counter[str] = Counter()
        self.stalls: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.read_by_kernels: Counter[str] = Counter()
        self.waits_of_host: Counter[str] = Counter()
        self.forget: Callable[[Any, Any], bool] = lambda waiting, on: False
        self.tape: Any = None  # a graph that is being captured has one (`phantom/graphs.py`)
        self._default: Clock = {}
        self._cells: dict[int, Cell] = {}
        self._shared: dict[int, Cell] = {}  # of the device, touched by a stream that does not own them
        self._copies: list[Copy] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """`torch.cpu` has this model's streams and events, and a copy to the host is one."""
        places = [(importlib.import_module(module), name) for module, name in D2H]  # none imports what is replaced
        with self.in_place_of(torch.cpu), ExitStack() as stack:
            for place, name in places:
                stack.enter_context(patch.object(place, name, self.async_d2h))
            stack.enter_context(patch.object(torch.Tensor, "record_stream", self.record_stream()))
            yield

    @contextmanager
    def in_place_of(self, *modules: Any) -> Iterator[None]:
        """Each of `modules` (`torch.cpu`, `torch.cuda`) has this model's streams and events."""
        with ExitStack() as stack:
            for kind in (Stream, Event):
                made = type(kind.__name__, (kind,), {"world": self})
                for module in modules:
                    stack.enter_context(patch.object(module, kind.__name__, made))
            yield

    def record_stream(self) -> Callable[[torch.Tensor, Any], None]:
        """In place of the method, which a CPU tensor does not have."""

        def record_stream(tensor: torch.Tensor, stream: Any) -> None:
            self.cell(tensor).recorded |= {self.name_of(stream)}

        return record_stream

    def prune(self) -> None:
        """Forget storages that are gone."""
        self._take_back()
        self._cells = {key: cell for key, cell in self._cells.items() if not cell.alive.expired()}

    def clock_of(self, stream: Any) -> Clock:
        return stream.clock if isinstance(stream, Stream) else self._default

    def name_of(self, stream: Any) -> str:
        return stream.name if isinstance(stream, Stream) else "default stream"

    def waits(self, waiting: Any, on: Any) -> bool:
        self._take_back()
        return not self.forget(waiting, on)

    def host_waits(self, clock: Clock) -> None:
        """The host goes on when everything in `clock` is done; copies that are done arrive."""
        self._take_back()
        _join(self.host, clock)
        arrived = [copy for copy in self._copies if copy.access.is_before(self.host)]
        self._copies = [copy for copy in self._copies if not copy.access.is_before(self.host)]
        with _disable_current_modes():
            for copy in arrived:
                copy.to.copy_(copy.source)

    def cell(self, tensor: torch.Tensor) -> Cell:
        storage = tensor.untyped_storage()
        found = self._cells.get(storage._cdata)
        if found is None:
            found = self._cells[storage._cdata] = Cell(StorageWeakRef(storage))
        return found

    def is_on_device(self, source: torch.Tensor) -> bool:
        """Not so a Python number that an assignment has made a tensor of."""
        cell = self.cell(source)
        return cell.place is None and (source.dim() > 0 or cell.written is not None)

    def on_host(self, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """An operator on host memory has run."""
        self._touch("host", self.host, self._cells_of(reads), self._cells_of(writes))

    def on_stream(self, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> Access:
        """An operator is issued on the current stream. It reads memory that is not pinned now, not when it runs."""
        stream = torch.cpu.current_stream()
        clock = self.clock_of(stream)
        _join(clock, self.host)
        later = self._cells_of(reads)
        at_once = [cell for cell in later if cell.place == HOST]
        if at_once:
            self._touch("host", self.host, at_once, ())
            # A number is an argument of the kernel.
            if any(t.dim() and self.cell(t).place == HOST for t in reads):
                self.sent_pageable()
            later = [cell for cell in later if cell.place != HOST]
        return self._touch(self.name_of(stream), clock, later, self._cells_of(writes))

    def copy_to_host(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """A copy that does not wait: `to` holds nonsense until the host has waited for the current stream."""
        access = self.on_stream([source], [to])
        with _disable_current_modes():
            to.fill_(_nonsense(to.dtype))
        self._copies.append(Copy(to, source, access))

    def async_d2h(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place of SGLang's, which on a CPU hands the tensor itself on."""
        if self.cell(tensor).place is not None:
            return tensor
        with _disable_current_modes():
            host = torch.empty_like(tensor)
        self.cell(host).place = PINNED
        self.copy_to_host(host, tensor)
        tensor.record_stream(torch.cpu.current_stream())
        return host

    def made_by_host(self, tensor: torch.Tensor, place: str) -> None:
        """Mark the work of a factory's operators as done at once."""
        if not _stands_in(site()):
            cell = self.cell(tensor)
            cell.place, cell.written, cell.read = place, None, {}

    def sent_pageable(self) -> None:
        """Host memory that is not pinned goes to the device."""
        sender = site()
        if not _stands_in(sender):
            self.pageable[sender] += 1

    def read_by_host(self, tensor: torch.Tensor, reader: str) -> None:
        """The host wants the values."""
        if self.cell(tensor).place is not None:
            self.on_host([tensor], ())
            return
        self.on_stream([tensor], ())
        if _stands_in(reader):
            self.read_by_kernels[reader] += 1
        else:
            self.stalls[reader] += 1
            self.host_waits(self.clock_of(torch.cpu.current_stream()))

    def _cells_of(self, tensors: Sequence[torch.Tensor]) -> list[Cell]:
        return [self.cell(tensor) for tensor in tensors]

    def _touch(self, agent: str, clock: Clock, reads: Sequence[Cell], writes: Sequence[Cell]) -> Access:
        now = clock[agent] = clock.get(agent, 0) + 1
        access = Access(agent, now, site())
        for cell in (*reads, *writes):
            if cell.place is None and cell.owner != agent:
                if cell.owner is None:
                    cell.owner = agent
                else:
                    self._shared[id(cell)] = cell
        for cell in reads:
            self._check(cell.written, clock, access, "reads what", "wrote")
            cell.read[agent] = access
        for cell in writes:
            self._check(cell.written, clock, access, "writes what", "wrote")
            for earlier in cell.read.values():
                self._check(earlier, clock, access, "writes what", "reads")
            cell.written, cell.read = access, {}
        return access

    def _take_back(self) -> None:
        """Give freed memory back to its owner; called before anybody waits, since nobody knows more until then."""
        for key in [key for key, cell in self._shared.items() if cell.alive.expired()]:
            cell = self._shared.pop(key)
            clock = dict(self.host)
            _join(clock, next((s.clock for s in self.streams if s.name == cell.owner), self._default))
            for access in (cell.written, *cell.read.values()):
                if access is None or access.agent in (cell.owner, *cell.recorded) or access.is_before(clock):
                    continue
                self.races[f"{cell.owner} may write again what {access.agent} uses: {access.site}"] += 1

    def _check(self, earlier: Access | None, clock: Clock, now: Access, does: str, did: str) -> None:
        if earlier is not None and not earlier.is_before(clock):
            self.races[
                f"{now.agent} {does} {earlier.agent} {did}, without a wait: {now.site} after {earlier.site}"
            ] += 1


def _stands_in(line: str) -> bool:
    """Whether `line`, which runs now, is a kernel on a GPU."""
    return line.startswith(KERNELS) or in_reference()


def _nonsense(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min // 3


def _join(clock: Clock, other: Mapping[str, int]) -> None:
    for agent, time in other.items():
        if time > clock.get(agent, 0):
            clock[agent] = time
