"""A captured graph on a CPU, with what it does and does not do: the same operators again, on the same memory.

A :class:`Tape` records every operator that a body issues once: which tensors it reads, the numbers it was called with,
and the tensor it wrote. :meth:`Tape.replay` issues them again in that order, as a graph would. Values that Python knew
while the body was recorded stay as they were; every temporary is poisoned before, so that a replay reads nothing that
it has not written, and what the body took from memory it takes from there again. A body that reads the device's values
on the host while it is recorded cannot be captured, and is told so.

Triton's interpreter does not dispatch: a launch is recorded as a whole where `launches` is on. So is a call of what is
one kernel on a GPU and plain torch here (`KERNELS`), which may read what it likes.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from streams import Streams
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from watching import Functions, tensors_of, unwatched

T = TypeVar("T")

LARGE = 1 << 30
"""Value of an integer temporary before a replay: no index is that large."""


KERNELS = (
    "whiflash_sglang.cache.backlog.park",
    "whiflash_sglang.cache.backlog.unpark",
    "whiflash_sglang.arms.block.dflash_catch_up",
    "whiflash_sglang.arms.chain.eagle3_catch_up",
    "whiflash_sglang.round.epilogue.accept_and_commit",
    "whiflash_sglang.round.epilogue.penalise_rows",
    "whiflash_sglang.round.epilogue.sample_rows",
    "sglang.srt.distributed.parallel_state.reg_all_gather_into_tensor",
    "sglang.srt.distributed.parallel_state.reg_reduce_scatter_tensor",
    "sglang.srt.layers.dp_attention.memcpy_func",
    "torch.distributed.all_reduce",
)
"""Functions of `whiflash_kernels` in captured passes, by where they are called; `draft_attention` is an operator. And
collective calls of DP attention.
"""


class NotCapturableError(Exception):
    """The body read a device's value, or sent one to the device, while it was recorded."""


class Tape(TorchDispatchMode):
    """A body as operators. Enter it, run the body, leave it; then `replay()` as often as needed. noted: its launches on
    the phantom card, by what they are and whose line they are of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted = Counter[str]()
        self._steps: list[Callable[[], None]] = []
        self._known: dict[int, torch.Tensor] = {}  # keeps them, so that no address is used twice
        self._temporaries: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise NotCapturableError("a value of the device becomes Python's")
        self._note_inputs([*args, *kwargs.values()])
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        fresh = [t for t in outputs if _memory(t) not in self._known]
        for tensor in fresh:
            self._known[_memory(tensor)] = tensor
            self._temporaries[_memory(tensor)] = tensor
        shares = func.is_view and not fresh  # `to` and `reshape` may copy, and are called views too
        if shares or func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            return result  # nothing is written

        def again() -> None:
            for old, new in zip(outputs, tensors_of(func(*args, **kwargs)), strict=True):
                if any(old is t for t in fresh):
                    if old.shape != new.shape:
                        raise NotCapturableError(f"{func} gives {tuple(new.shape)} now, {tuple(old.shape)} then")
                    old.copy_(new)

        self._steps.append(again)
        return result

    def call(self, kernel: Callable[..., Any], *args: Any, reads: Sequence[torch.Tensor] = (), **kwargs: Any) -> Any:
        """Call `kernel` and note the call as one operator, whatever it does inside.

        reads: tensors of its arguments that are in records, which nobody looks into.
        """
        self._note_inputs(tree_leaves((args, kwargs, list(reads))))
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            result = kernel(*args, **kwargs)
        fresh = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and _memory(t) not in self._known]
        for tensor in fresh:
            self._known[_memory(tensor)] = self._temporaries[_memory(tensor)] = tensor

        def again() -> None:
            found = [t for t in tree_leaves(kernel(*args, **kwargs)) if isinstance(t, torch.Tensor)]
            for old, new in zip(fresh, found, strict=True):
                old.copy_(new)

        self._steps.append(again)
        return result

    def record_launch(self, launch: Callable[[], None], tensors: Sequence[torch.Tensor]) -> None:
        """Note a call that does not dispatch, after it was made."""
        self._note_inputs(tensors)
        self._steps.append(launch)

    def made(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory was allocated while the body was recorded."""
        return _memory(tensor) in self._temporaries

    def spoil(self) -> None:
        """Poison all temporaries, the results among them. No model of streams sees it: no device would do it."""
        with unwatched():
            for tensor in self._temporaries.values():
                poison(tensor)

    def replay(self) -> None:
        """Issue every operator again, with all temporaries poisoned."""
        self.spoil()
        for step in self._steps:
            step()

    def _note_inputs(self, inputs: Sequence[Any]) -> None:
        for tensor in tensors_of(inputs):
            self._known.setdefault(_memory(tensor), tensor)


@contextmanager
def recording(launches: bool = False) -> Iterator[Tape]:
    """Record what runs inside. Raises NotCapturableError where the host reads from the device, or sends to it."""
    tape, world = Tape(), Streams()
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            module, function = name.rsplit(".", 1)
            kernel = getattr(importlib.import_module(module), function)
            stack.enter_context(patch(name, partial(tape.call, kernel)))
        if launches:
            stack.enter_context(_interpreted_launches(tape))
        stack.enter_context(Functions(world))
        stack.enter_context(tape)
        yield tape
    if reads := world.stalls + world.read_by_kernels + world.uploads:
        raise NotCapturableError(f"reads, or sends to it: {dict(reads)}")


class TapeRecorder:
    """Captures passes of drafters as tapes (`whiflash_sglang.device.capture.Recorder`). replays: of all of them."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        body()  # as a GPU's capture would: what is made once is made before
        try:
            with recording() as tape:
                found = body()
        except NotCapturableError as error:
            raise RuntimeError(str(error)) from error  # as torch has it

        def again() -> None:
            self.replays += 1
            tape.replay()

        return again, found


def poison(tensor: torch.Tensor) -> None:
    """Fill a tensor's whole memory with what must not be read."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    flat.fill_(torch.nan if flat.is_floating_point() else True if flat.dtype == torch.bool else _large(flat.dtype))


def _large(dtype: torch.dtype) -> int:
    return min(LARGE, torch.iinfo(dtype).max)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _interpreted_launches(tape: Tape) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        def launch() -> None:
            with torch.utils._python_dispatch._disable_current_modes():
                call(self, *args, **kwargs)

        launch()
        tape.record_launch(launch, [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)])

    with patch.object(GridExecutor, "__call__", recorded):
        yield
