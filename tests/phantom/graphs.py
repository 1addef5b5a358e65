"""Graphs on the phantom card: captured operators are issued again, on the same memory, as one launch of a stream.

A read or wait of the host's, a copy from pageable memory, or a copy to the host raises while a graph is captured, as on
CUDA. Each graph has memory of its own, where CUDA's share a pool: what one has freed when its capture ended belongs to
graphs that are captured later, so a replay spoils all memory of these. CUDA's keep no memory that was allocated before:
:meth:`Graph.dangling` names what they alone would use.
Operators run during a capture, too, where CUDA would only note them; the memory that they touch is noted for replays.
"""

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from sites import site
from streams import HOST, Streams
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

sys.path.insert(0, str(Path(__file__).parents[1] / "graphs"))

from op_tape import Tape


class Part(NamedTuple):
    """Operators between two events: the memory that they touch."""

    reads: dict[int, torch.Tensor]
    writes: dict[int, torch.Tensor]


class Graph:
    """In place of `torch.cuda.CUDAGraph`. replays: of all graphs of the world. by_pool: the graphs of each pool, in the
    order of their captures.
    """

    world: Streams
    replays = 0
    by_pool: dict[Any, list["Graph"]]

    def __init__(self, *_: Any, **__: Any) -> None:
        self._tape = Tape()
        self._parts, self._events = [Part({}, {})], list[Any]()
        self._met: dict[int, tuple[str, torch.Tensor]] = {}
        self._later: list[Graph] = []
        self._spoilt = False  # and not replayed since

    def replay(self) -> None:
        """All operators; each event is recorded again where it was. Memory of graphs captured later is spoilt."""
        type(self).replays += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for graph in self._later:
                if not graph._spoilt:
                    graph._tape.spoil()
                    graph._spoilt = True
            self._tape.replay()
            self._spoilt = False
        for part, event in zip_longest(self._parts, self._events):
            self.world.on_stream(list(part.reads.values()), list(part.writes.values()))
            if event is not None:
                event.record()

    def reset(self) -> None:
        """Its memory is given back."""
        self._tape, self._met = Tape(), {}

    @classmethod
    def dangling(cls) -> dict[str, int]:
        """Give up all graphs: where they use memory that nobody but them held, and how much of it."""
        before = [met for graphs in cls.by_pool.values() for graph in graphs for met in graph._outside()]
        for graph in chain.from_iterable(cls.by_pool.values()):
            graph.reset()
            graph._parts.clear()
        gc.collect()
        return Counter(where for where, memory in before if memory.expired())

    def _outside(self) -> Iterator[tuple[str, StorageWeakRef]]:
        """Memory of the card that was allocated before the capture, and the line that used it first."""
        for where, tensor in self._met.values():
            if not self._tape.made(tensor) and self.world.cell(tensor).place is None:
                yield where, StorageWeakRef(tensor.untyped_storage())

    @contextmanager
    def captured(self, pool: Any) -> Iterator[None]:
        """Operators are noted here; a wait of the host raises RuntimeError."""
        world = self.world
        for graph in self.by_pool.setdefault(pool, []):
            graph._later.append(self)
        self.by_pool[pool].append(self)

        def touched(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
            for tensor in (*reads, *writes):
                self._met.setdefault(tensor.untyped_storage()._cdata, (site(), tensor))
            if any(tensor.dim() and world.cell(tensor).place == HOST for tensor in reads):
                refused()
            for kept, tensors in zip(self._parts[-1], (reads, writes), strict=True):
                kept |= {tensor.untyped_storage()._cdata: tensor for tensor in tensors}

        def recorded(event: Any, stream: Any = None) -> None:
            self._events.append(event)
            self._parts.append(Part({}, {}))

        def refused(*_: Any) -> None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {site()} waits")

        def read(tensor: torch.Tensor, reader: str) -> None:
            if world.cell(tensor).place is None:
                refused()

        stand_ins = {"tape": self._tape, "on_stream": touched, "read_by_host": read, "sent_pageable": refused}
        with ExitStack() as stack:
            for name, stand_in in {**stand_ins, "copy_to_host": refused, "host_waits": refused}.items():
                stack.enter_context(patch.object(world, name, stand_in))
            stack.enter_context(patch.object(torch.cuda.Event, "record", recorded))
            yield


@contextmanager
def graphs(world: Streams) -> Iterator[None]:
    """`torch.cuda` captures such graphs."""

    @contextmanager
    def capture(cuda_graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream or torch.cuda.current_stream()), cuda_graph.captured(pool or cuda_graph):
            yield

    with ExitStack() as stack:
        for name, stand_in in {
            "CUDAGraph": type("CUDAGraph", (Graph,), {"world": world, "by_pool": {}}),
            "graph": capture,
            "graph_pool_handle": lambda: (0, 1),
            "is_current_stream_capturing": lambda: world.tape is not None,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        yield
