"""Launches of kernels on the phantom card, each taken by what computes the same on the memory that the card has.

What a launch does to memory is noted as one operator of the current stream. A tensor of the host among its arguments is
refused as Triton refuses it, and what a reference reads of its own arguments no host waits for.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from card import Card
from numpy.typing import NDArray
from streams import Streams
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from whiflash_kernels import dispatch

FROM_HOST = "Pointer argument (at {}) cannot be accessed from Triton (cpu tensor?)"


class Launches:
    """counts: by name. stored: addresses that the launch under way has written, where somebody notes them."""

    def __init__(self, world: Streams) -> None:
        self.counts: Counter[str] = Counter()
        self.stored: list[NDArray[np.int64]] = []
        self._world = world

    def of(self, name: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `kernel` computes of the card's memory, as one launch."""
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
                out = self._world.tape.call(kernel, *opened, reads=given, **named)
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
