"""A program's accesses to memory, and their times: noted for the model of `streams`, operator by operator."""

import linecache
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

import torch
from sites import calling_frame, site
from streams import HOST, PINNED, Streams
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

READS = {"tolist", "item", "cpu", "numpy", "equal", "allclose", "nonzero", "argwhere", "masked_select", "bincount"}
READS |= {"unique", "unique_consecutive", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
"""Functions and methods whose result, or its shape, is known only when the device is done. `tolist` and `item` do not
dispatch on CPU tensors, so a dispatch mode cannot see them; a function mode can.
"""
UPLOADS = {"tensor", "as_tensor", "from_numpy", "asarray"}
FACTORIES = UPLOADS | {"frombuffer", "arange", "empty", "zeros", "ones", "full", "linspace", "empty_strided", "rand"}
FACTORIES |= {"randint", "randn"}
SHAPE_ONLY = ("empty", "new_empty", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
"""Operators that read the shape of their arguments only."""


@contextmanager
def noting_births(world: Streams) -> Iterator[None]:
    """While the engine is built: which of its buffers are the host's."""
    with _Births(world):
        yield


@contextmanager
def watching(world: Streams) -> Iterator[None]:
    """Operators and reads by the host are noted."""
    world.prune()
    with Operators(world), Functions(world):
        yield


@contextmanager
def unwatched() -> Iterator[None]:
    """Work inside is noted by nobody: the test's own reads, and messages between hosts."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class OfStreams:
    """A mode of torch's, beside a model of streams."""

    def __init__(self, world: Streams) -> None:
        super().__init__()
        self.world = world


class Mode(OfStreams, TorchDispatchMode):
    """A mode in processes that compile nothing, so that no call has to be hidden from torch's compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Operators(Mode):
    """Every operator that touches memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, world = kwargs or {}, self.world
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        name, arguments = _signature(func)
        reads, writes = _touched(arguments, args, kwargs)
        if name.startswith(SHAPE_ONLY):
            reads = []
        touched = tensors_of(args)
        storages = {t.untyped_storage()._cdata for t in touched}
        made = [t for t in tensors_of(out) if t.untyped_storage()._cdata not in storages]
        on_host = bool(touched and world.cell(touched[0]).place)
        if made and not writes and not on_host and not (reads and world.cell(reads[0]).place):
            world.on_stream(reads, made)
            return out
        self._note(name, reads, writes, kwargs.get("non_blocking", len(args) > 2 and args[2]))
        if on_host:
            for tensor in made:
                world.cell(tensor).place = HOST
        elif made:
            world.on_stream((), made)
        return out

    def _note(
        self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], non_blocking: Any
    ) -> None:
        """The first tensor says where it runs: of the others only an index, or a copy's source, may lie elsewhere."""
        world = self.world
        if not reads and not writes:
            return
        if not world.cell((*writes, *reads)[0]).place:
            world.on_stream(reads, writes)
        elif name != "copy_" or not world.is_on_device(reads[-1]):
            world.on_host(reads, writes)
        elif non_blocking:
            world.copy_to_host(writes[0], reads[-1])
        else:
            world.read_by_host(reads[-1], site())
            world.on_host((), writes)


GRAMMARS = "sglang/srt/constrained/"
"""Modules that write masks on the host, in memory that is the device of a CPU."""


class Functions(OfStreams, TorchFunctionMode):
    """Factories of memory, and calls that do not dispatch: reads by the host, and moves between one device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is None:
            out = func(*args, **kwargs)
            if name in FACTORIES and isinstance(out, torch.Tensor):
                if "pin_memory" in kwargs:
                    self.world.made_by_host(out, PINNED)
                elif kwargs.get("device") is None or _says('"cpu"') or site().startswith(GRAMMARS):
                    self.world.made_by_host(out, HOST)
                elif name in UPLOADS:
                    self.world.sent_pageable()
            return out
        if name == "cpu" or (name == "to" and _names_device(args, kwargs)):
            return self._moved(func, name, tensor, args, kwargs)
        if (name in READS or _depends_on_values(name, args)) and not _says("_cpu."):  # so SGLang calls the host's
            self.world.read_by_host(tensor, f"{site()} {name}")
        elif _assigns_number(name, args) and self.world.cell(tensor).place is None:
            self.world.sent_pageable()
        return func(*args, **kwargs)

    def _moved(self, func: Any, name: str, tensor: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make a copy if a GPU would make one."""
        world, to_host = self.world, name == "cpu" or _says('"cpu"')
        if to_host == (world.cell(tensor).place is not None):
            return func(*args, **kwargs)
        if to_host:
            world.read_by_host(tensor, f"{site()} {name}")
        elif world.cell(tensor).place == PINNED:
            world.uploads[site()] += 1
        moved = func(*args, **kwargs)
        moved = torch.empty(tensor.shape, dtype=moved.dtype, device=tensor.device).copy_(tensor)
        if to_host:
            world.made_by_host(moved, HOST)
        return moved


class _Births(Functions):
    """Before the loop runs: which buffers are the host's, as far as that is said."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "__name__", "") in FACTORIES and isinstance(out, torch.Tensor):
            if "pin_memory" in kwargs:
                self.world.made_by_host(out, PINNED)
            elif kwargs.get("device") is not None and _says('"cpu"'):
                self.world.made_by_host(out, HOST)
        return out


@cache
def _signature(func: Any) -> tuple[str, tuple[tuple[str, bool], ...]]:
    """An operator's name, and its arguments: their names, and whether they are written to."""
    arguments = [(each.name, each.alias_info) for each in func._schema.arguments]
    written = ((name, alias is not None and alias.is_write) for name, alias in arguments)
    return func.overloadpacket.__name__, tuple(written)


def _touched(
    arguments: Sequence[tuple[str, bool]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    reads: list[torch.Tensor] = []
    writes: list[torch.Tensor] = []
    for i, (name, written) in enumerate(arguments):
        value = args[i] if i < len(args) else kwargs.get(name)
        if isinstance(value, torch.Tensor | list | tuple):
            (writes if written else reads).extend(tensors_of(value))
    return reads, writes


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_of(v)]
    return []


def _names_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("device") is not None or any(isinstance(a, str | torch.device) for a in args[1:])


def _depends_on_values(name: str, args: Sequence[Any]) -> bool:
    """Whether the result has as many elements as a mask has true values: an index, or `where` with a condition only."""
    if name == "where":
        return len(args) == 1
    if name not in ("__getitem__", "__setitem__"):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index)


def _assigns_number(name: str, args: Sequence[Any]) -> bool:
    """Whether one element becomes a number of Python's: torch copies it, where it fills what has any dimension."""
    if name != "__setitem__" or not isinstance(args[2], int | float):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return len(index) == args[0].dim() and all(isinstance(part, int) for part in index)


def _says(words: str) -> bool:
    """Whether the call has these words. SGLang's code names the CPU by a literal for the host's tensors only."""
    frame = calling_frame()
    return words in _call(frame.f_code, frame.f_lasti)


@cache
def _call(code: CodeType, instruction: int) -> str:
    positions = list(code.co_positions())[instruction // 2]
    first, last = positions[0] or code.co_firstlineno, positions[1] or code.co_firstlineno
    return "".join(linecache.getline(code.co_filename, line) for line in range(first, last + 1))
