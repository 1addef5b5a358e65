"""Launches of kernels on the phantom card, each taken by what computes the same on the memory that the card has.

A launch's effect on memory is noted as one operator of the current stream. A tensor of the host among its arguments is
refused as Triton refuses it, and what a reference reads of its own arguments no host waits for.
"""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from card import NO_LAUNCH, Card, Rules
from numpy.typing import NDArray
from sites import site
from streams import Streams
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from whiflash_kernels import dispatch

FROM_HOST = "Pointer argument (at {}) cannot be accessed from Triton (cpu tensor?)"


class Launches:
    """counts: by name. stored: addresses that the launch under way has written, where somebody notes them. compiled:
    SGLang's kernels, each with what Triton would compile it for.
    """

    def __init__(self, world: Streams) -> None:
        self.counts: Counter[str] = Counter()
        self.compiled: set[tuple[str, str]] = set()
        self.stored: list[NDArray[np.int64]] = []
        self._world = world

    def of(self, name: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Results of `kernel` on the card's memory, as one launch."""
        self.counts[name] += 1
        given: list[torch.Tensor] = []

        def held(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, Card):
                raise ValueError(FROM_HOST.format(len(given)))
            given.append(tensor.held)
            return tensor.held

        opened, named = _mapped(args, held), _mapped(kwargs, held)
        self.stored.clear()
        before = [tensor._version for tensor in given]
        with _disable_current_modes():
            if self._world.tape is None:
                out = kernel(*opened, **named)
            else:
                self._world.tape.noted[f"{name} {site()}"] += 1
                out = self._world.tape.call(kernel, *opened, reads=given, **named)
        self.stored[:] = [np.concatenate(self.stored)] if self.stored else []
        pairs = zip(given, before, strict=True)
        written = [tensor for tensor, then in pairs if tensor._version > then or self._stored_to(tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in given}
        made = [
            leaf
            for leaf in tree_leaves(out)
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known
        ]
        self._world.on_stream(given, [*written, *made])
        return tree_map(lambda leaf: Card(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)

    def _stored_to(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return any(((places >= begin) & (places < end)).any() for places in self.stored)

    @contextmanager
    def whole(self, inside: Counter[str] | None = None) -> Iterator[Counter[str]]:
        """All that is launched inside, by what it is and whose line launched it: kernels, graphs, operators, copies.

        inside: takes what the graphs launch.
        """
        seen, graph, rules = Counter[str](), torch.cuda.CUDAGraph.replay, Rules.__torch_dispatch__
        of, replaying = Launches.of, False

        def launched(launches: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            seen[f"{name} {site()}"] += not replaying
            return of(launches, name, *args, **kwargs)

        def replayed(self: Any) -> None:
            nonlocal replaying
            seen[f"graph {site()}"] += 1
            if inside is not None:
                inside.update(self._tape.noted)
            replaying = True
            graph(self)
            replaying = False

        def dispatched(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out, name = rules(self, func, types, args, kwargs), func.overloadpacket.__name__
            touched = tree_leaves((args, kwargs, out))
            on_card = not func.is_view and any(isinstance(leaf, Card) for leaf in touched)
            seen[f"{name} {site()}"] += on_card and not replaying and not name.startswith(NO_LAUNCH)
            return out

        with (
            patch.object(Launches, "of", launched),
            patch.object(torch.cuda.CUDAGraph, "replay", replayed),
            patch.object(Rules, "__torch_dispatch__", dispatched),
        ):
            yield seen


def compiled_for(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[str, str]:
    """A kernel's name, and what Triton compiles it for: constants, kinds, and what it assumes of numbers and places."""
    parameters = inspect.signature(kernel.fn).parameters
    known = {
        name
        for part in ("do_not_specialize", "do_not_specialize_on_alignment")
        for name in kernel.kwargs.get(part) or ()
    }

    def kind(name: str, value: Any) -> str:
        if isinstance(value, tuple):
            return f"({', '.join(kind(name, each) for each in value)})"
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {name in known or value.storage_offset() * value.itemsize % 16 == 0}"
        if not isinstance(value, int) or isinstance(value, bool) or "constexpr" in str(parameters[name].annotation):
            return str(value)
        return "int" if name in known else "one" if value == 1 else f"int {value % 16 == 0}"

    given = dict(zip(parameters, args, strict=False)) | options
    return kernel.fn.__name__, ", ".join(
        f"{name}={kind(name, value) if name in parameters else value}" for name, value in sorted(given.items())
    )


@contextmanager
def kernels_taken(world: Streams) -> Iterator[Launches]:
    """Our kernels are taken by their references."""
    launches = Launches(world)

    def taken(reference: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        tensor = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
        if dispatch.backend_for(tensor) == "torch":
            return reference
        return partial(launches.of, reference.__name__, reference)

    with patch.object(dispatch, "implementation", taken):
        yield launches


def _mapped(tree: Any, of_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`tree` with other tensors, those of our records too."""

    def mapped(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return of_tensor(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            parts = {f.name: _mapped(getattr(leaf, f.name), of_tensor) for f in dataclasses.fields(leaf)}
            return dataclasses.replace(leaf, **parts)
        return leaf

    return tree_map(mapped, tree)
