"""Graphs on the phantom card: captured operators are issued again, on the same memory, as one launch of a stream.

A read or wait of the host's, a copy from pageable memory, or a copy to the host raises while a graph is captured, as on
CUDA. Each graph has memory of its own, where CUDA's share one pool.
Operators run during a capture, too, where CUDA would only note them; the memory that they touch is noted for replays.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from sites import site
from streams import HOST, Streams
from torch.utils._python_dispatch import _disable_current_modes

sys.path.insert(0, str(Path(__file__).parents[1] / "graphs"))

from op_tape import Tape

NOT_PERMITTED = "operation not permitted when stream is capturing: {} waits"


class Part(NamedTuple):
    """Operators between two events: the memory that they touch."""

    reads: dict[int, torch.Tensor]
    writes: dict[int, torch.Tensor]


class Graph:
    """In place of `torch.cuda.CUDAGraph`. replays: of all graphs of the world."""

    world: Streams
    replays = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self._tape = Tape()
        self._parts, self._events = [Part({}, {})], list[Any]()

    def replay(self) -> None:
        """All operators; each event is recorded again where it was."""
        type(self).replays += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            self._tape.replay()
        for part, event in zip_longest(self._parts, self._events):
            self.world.on_stream(list(part.reads.values()), list(part.writes.values()))
            if event is not None:
                event.record()

    def reset(self) -> None:
        """Its memory is given back."""
        self._tape = Tape()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Operators are noted here; a wait of the host raises RuntimeError."""
        world = self.world

        def touched(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
            if any(tensor.dim() and world.cell(tensor).place == HOST for tensor in reads):
                refused()
            for kept, tensors in zip(self._parts[-1], (reads, writes), strict=True):
                kept |= {tensor.untyped_storage()._cdata: tensor for tensor in tensors}

        def recorded(event: Any, stream: Any = None) -> None:
            self._events.append(event)
            self._parts.append(Part({}, {}))

        def refused(*_: Any) -> None:
            raise RuntimeError(NOT_PERMITTED.format(site()))

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
        with torch.cuda.stream(stream or torch.cuda.current_stream()), cuda_graph.captured():
            yield

    with ExitStack() as stack:
        for name, stand_in in {
            "CUDAGraph": type("CUDAGraph", (Graph,), {"world": world}),
            "graph": capture,
            "graph_pool_handle": lambda: (0, 1),
            "is_current_stream_capturing": lambda: world.tape is not None,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        yield
