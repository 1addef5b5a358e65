"""Tensors that say `cuda:0`, live on the CPU and obey a card's rules.

A :class:`Card` wraps a tensor of the CPU. While :func:`phantom` is on, every factory that is told `cuda` makes one, and

- an operator takes the card's tensors together with the host's only where CUDA does: copies, indices, numbers;
- what would wait for the card on CUDA is noted by `tests/streams.py` with its line: values that become Python's, shapes
  that depend on values, copies from memory that is not pinned, copies that do not say `non_blocking`;
- pinned memory is what was asked for as such, and a copy to it arrives when the host has waited for it;
- streams and events are the model's, under `torch.cuda`'s names, and so are races between them.

The model need not guess here what is the host's: a tensor says it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from graphs import graphs
from h100 import answers
from sites import site
from streams import HOST, PINNED, Streams
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from watching import READS, Mode, OfStreams, Operators, tensors_of
from whiflash_kernels.attention import _draft_attention

DEVICE = torch.device("cuda", 0)

INDEXED = ("index", "_unsafe_index", "index_put_", "index_put", "_index_put_impl_")
"""Their indices may lie on the host; they are copied, which waits."""

COPIES = ("copy_", "_to_copy", "_foreign_copy_", "copy")

OF_VALUES = {
    *("_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "multinomial", "nonzero"),
    *("unique_consecutive", "unique_dim"),
}
"""Operators for whose results, or whose results' shapes, the host waits."""

NO_LAUNCH = ("empty", "new_empty", "set_", "_local_scalar_dense", "draft_attention")
"""Operators that launch nothing, or only what is counted as a kernel."""

TAKE_NUMBERS = ("fill_", "fill", "masked_fill_", "masked_fill", "index_fill_", "index_put_", "where")
"""Operators that take a number of the host's, beside all that go element by element."""

MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({})"


class Card(torch.Tensor):
    """A tensor of the phantom card. held: where its numbers are, a plain tensor of the CPU."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Card":
        made: Card = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Card({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func} on the card, but nobody plays the card: the test has left `phantom`")


@contextmanager
def phantom() -> Iterator[Streams]:
    """A card, as far as torch can tell. The result is the model of streams' record."""
    world = Streams()
    torch._C._ensureCUDADeviceGuardSet()  # else indexing would ask the driver, as for torch's own fake tensors
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(world.in_place_of(torch.cpu, torch.cuda))
        first = torch.cuda.Stream()
        first.name = "stream of the start"
        stack.enter_context(torch.cpu.stream(first))
        stack.enter_context(answers(world))
        stack.enter_context(graphs(world))
        stack.enter_context(patch.object(torch.Tensor, "record_stream", _record_stream(world)))
        stack.enter_context(Operators(world))
        stack.enter_context(Rules(world))
        stack.enter_context(_Calls(world))
        yield world


def _record_stream(world: Streams) -> Any:
    """In place of the method, whose parser takes torch's own streams alone."""

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        if not isinstance(tensor, Card):
            raise NotImplementedError("Could not run 'aten::record_stream' with arguments from the 'CPU' backend.")
        world.cell(tensor.held).recorded |= {world.name_of(stream)}

    return record_stream


class Rules(Mode):
    """Every operator, by the card's rules; what it does to memory is noted by the mode outside of this one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.whiflash.draft_attention.default:
            with self:  # ours, in Python, which launches a kernel
                return _draft_attention(*args)
        tensors = tensors_of([*args, *kwargs.values()])
        cards = [t for t in tensors if isinstance(t, Card)]
        for tensor in tensors:
            if not isinstance(tensor, Card):
                self.claim(tensor)
        name = func.overloadpacket.__name__
        asked = kwargs.get("device")
        if name == "_to_copy" and asked is not None and (asked.type == "cuda") != bool(cards):
            return self._moved(tensors[0], bool(cards), kwargs)
        if cards and len(cards) < len(tensors) and name not in COPIES:
            _refuse_mixed(func, args, kwargs)
        if cards and (name in OF_VALUES or _counts_true(name, args, kwargs)):
            self.world.read_by_host(cards[0].held, f"{site()} {name}")
        if name == "copy_":
            return self._copied(func, args, kwargs)
        on_card = asked.type == "cuda" if asked is not None else bool(cards)
        pinned = bool(kwargs.pop("pin_memory", False))
        if on_card and asked is not None:
            kwargs["device"] = torch.device("cpu")
        out = self._issued(func, _held(args), _held(kwargs))
        if not on_card:
            for made in () if tensors else tensors_of(out):
                cell = self.world.cell(made)  # made at once, whatever stream is current
                cell.place, cell.written, cell.owner = PINNED if pinned else HOST, None, None
            return out
        return _same_or_new(cards, out)

    def _issued(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the operator, and note it where a graph is captured."""
        tape, name = self.world.tape, func.overloadpacket.__name__
        if tape is not None:
            tape.noted[f"{name} {site()}"] += not func.is_view and not name.startswith(NO_LAUNCH)
        return func(*args, **kwargs) if tape is None else tape.__torch_dispatch__(func, (), args, kwargs)

    def claim(self, tensor: torch.Tensor) -> None:
        """A tensor that nobody has met is the host's."""
        cell = self.world.cell(tensor)
        if cell.place is None and cell.owner is None:
            cell.place = HOST

    def _copied(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`copy_`: asynchronous only between the card and pinned memory."""
        to, source = args[0], args[1]
        asynchronous = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
        if isinstance(to, Card) and not isinstance(source, Card):
            pinned = self.world.cell(source).place == PINNED
            if (not asynchronous and pinned) or source.dim() == 0:
                self.world.sent_pageable()
        elif isinstance(source, Card) and not isinstance(to, Card):
            asynchronous = asynchronous and self.world.cell(to).place == PINNED
        self._issued(func, (*_held((to, source)), asynchronous), {})
        return to

    def _moved(self, tensor: torch.Tensor, to_host: bool, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """`.to` of the other device. A copy that does not wait goes to pinned memory, as torch has it."""
        dtype, asynchronous = kwargs.get("dtype") or tensor.dtype, bool(kwargs.get("non_blocking"))
        with torch.utils._python_dispatch._disable_current_modes():
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype)
        if to_host:
            self.world.cell(made).place = PINNED if asynchronous else HOST
        moved = made if to_host else Card(made)
        self._copied(torch.ops.aten.copy_.default, (moved, tensor, asynchronous), {})
        return moved


class _Calls(OfStreams, TorchFunctionMode):
    """Calls without dispatch: reads of the host's own memory, lists that become tensors of the card, pinned memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tuple(map(_numbered, args)), {k: _numbered(v) for k, v in (kwargs or {}).items()}
        first = args[0] if args else None
        if name == "cuda" and isinstance(first, torch.Tensor):
            return first.to(DEVICE, **kwargs)
        if name == "data_ptr" and isinstance(first, Card):
            return first.held.data_ptr()
        if name == "tolist" and isinstance(first, Card):
            return first.cpu().tolist()  # torch refuses it of a wrapper, as it does the next
        if name == "numpy" and isinstance(first, Card):
            if not kwargs.get("force"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            return first.cpu().numpy()
        if name in ("tensor", "as_tensor", "asarray") and not isinstance(first, torch.Tensor):
            return self._made(func, args, kwargs)
        if isinstance(first, torch.Tensor) and name in ("pin_memory", "is_pinned"):
            return getattr(self, f"_{name}")(first, *args[1:])
        of_host = isinstance(first, torch.Tensor) and not isinstance(first, Card)
        if name in READS and of_host and self.world.cell(first).place is not None:
            self.world.read_by_host(first, site())
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        """Tensors of Python's or numpy's numbers."""
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        with torch.utils._python_dispatch._disable_current_modes():
            made: torch.Tensor = func(*args, **kwargs, device="cpu")
        self.world.cell(made).place = PINNED if pinned else HOST
        return made if device is None else made.to(device)

    def _pin_memory(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        if isinstance(tensor, Card):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        if self._is_pinned(tensor):
            return tensor
        with torch.utils._python_dispatch._disable_current_modes():
            copy = tensor.clone()
        self.world.cell(copy).place = PINNED
        return copy

    def _is_pinned(self, tensor: torch.Tensor, *_: Any) -> bool:
        return not isinstance(tensor, Card) and self.world.cell(tensor).place == PINNED


def _numbered(value: Any) -> Any:
    """The card by its number: torch would ask the driver which one is current."""
    if (isinstance(value, str) and value == "cuda") or (isinstance(value, torch.device) and value.type == "cuda"):
        return DEVICE
    return value


def _refuse_mixed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises RuntimeError as CUDA does where an operator takes tensors of both."""
    name = func.overloadpacket.__name__
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_leaves(value):
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, Card):
                continue
            is_index = name in INDEXED and i == 1 and isinstance(args[0], Card)
            number = tensor.dim() == 0 and (torch.Tag.pointwise in func.tags or name in TAKE_NUMBERS)
            if written or not (is_index or number):
                raise RuntimeError(MIXED.format(f"{name}, argument {argument.name}"))


def _counts_true(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the number of true values is asked for: by a mask as an index, or repetitions without their sum."""
    if name in INDEXED:
        masks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        filled = "put" in name and args[2].numel() == 1 and not isinstance(args[2], Card)
        return masks and not filled
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _held(value: Any) -> Any:
    if isinstance(value, Card):
        return value.held
    if type(value) in (list, tuple):
        return type(value)(map(_held, value))
    return {name: _held(part) for name, part in value.items()} if type(value) is dict else value


def _same_or_new(cards: Sequence[Card], out: Any) -> Any:
    """A result is the argument that it was written to, or a new tensor of the card."""
    if not isinstance(out, torch.Tensor):
        return type(out)(_same_or_new(cards, part) for part in out) if type(out) in (list, tuple) else out
    card = next((card for card in cards if card.held is out), None)
    # A view in place (`unsqueeze_`) is another tensor here; nobody uses the one that it was called on.
    return card if card is not None and card.shape == out.shape else Card(out)
