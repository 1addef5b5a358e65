"""Everything that an object leads to."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def held(root: Any, owners: tuple[str, ...] = ("whiflash",), beside: object = None) -> Iterator[tuple[str, Any]]:
    """Each once, with a shortest path: through containers and objects of packages that begin as one of `owners`.

    beside: not looked at.
    """
    seen, open_ = {id(beside)}, deque([("", root)])
    while open_:
        path, kept = open_.popleft()
        if id(kept) in seen:
            continue
        seen.add(id(kept))
        yield path, kept
        if isinstance(kept, Mapping):
            open_ += [(f"{path}[{key!r}]", value) for key, value in kept.items()]
        elif isinstance(kept, list | tuple | set | frozenset | deque):
            open_ += [(f"{path}[{i}]", value) for i, value in enumerate(kept)]
        elif type(kept).__module__.startswith(owners) and not isinstance(kept, torch.Tensor):
            slots = [name for kind in type(kept).__mro__ for name in vars(kind).get("__slots__", ())]
            names = [name for name in (*getattr(kept, "__dict__", ()), *slots) if hasattr(kept, name)]
            open_ += [(f"{path}.{name}", getattr(kept, name)) for name in names]


def tensors_of(root: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Those that are tensors, by their paths."""
    return {path: kept for path, kept in held(root, **options) if isinstance(kept, torch.Tensor)}
