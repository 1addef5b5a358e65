"""Launches of our kernels on the phantom card, each taken by its reference, on the memory that the card has.

What a launch does to memory is noted as one operator of the current stream. A tensor of the host among its arguments is
refused as Triton refuses it, and what a reference reads of its own arguments no host waits for.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from card import Card
from streams import Streams
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from whiflash_kernels import dispatch

FROM_HOST = "Pointer argument (at {}) cannot be accessed from Triton (cpu tensor?)"


@contextmanager
def kernels_taken(world: Streams) -> Iterator[Counter[str]]:
    """What is counted: launches, by the op's name."""
    launches: Counter[str] = Counter()
    find = dispatch._module

    def module(package: str, name: str) -> Any:
        reference = find("reference", name)
        return reference if package == "reference" else _Kernels(reference, world, launches)

    with patch.object(dispatch, "_module", module):
        yield launches


class _Kernels:
    """A module of `triton_kernels`."""

    def __init__(self, reference: Any, world: Streams, launches: Counter[str]) -> None:
        self._reference, self._world, self._launches = reference, world, launches

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._reference, name)

        def launch(*args: Any) -> Any:
            self._launches[name] += 1
            given: list[torch.Tensor] = []

            def held(tensor: torch.Tensor) -> torch.Tensor:
                if not isinstance(tensor, Card):
                    raise ValueError(FROM_HOST.format(len(given)))
                given.append(tensor.held)
                return tensor.held

            opened = _mapped(args, held)
            before = [tensor._version for tensor in given]
            with _disable_current_modes():
                out = op(*opened)
            written = [
                tensor for tensor, version in zip(given, before, strict=True) if tensor._version > version
            ]
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            self._world.on_stream(given, [*written, *made])
            return tree_map(lambda leaf: Card(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)

        return launch


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
