"""Reads of the device by the host, and copies to it, while it plans: on a CPU nothing would show otherwise.

`tolist` and `item` do not dispatch on CPU tensors, so a dispatch mode cannot see them; a function mode can. Everything
that waits for the device on a GPU counts as a read: values that become Python's, and shapes that depend on values.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sites import in_reference, site
from torch.overrides import TorchFunctionMode

READS = frozenset(
    {
        "tolist",
        "item",
        "cpu",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "equal",
        "allclose",
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "bincount",
    }
)
"""Functions and methods whose result, or its shape, is known only when the device is done."""

UPLOADS = frozenset({"tensor", "as_tensor", "from_numpy", "asarray"})


STAND_INS = ("whiflash_kernels/reference/", "whiflash_cpu/")
"""Files in which a CPU does the work of kernels, as the bodies of our ops do: nobody would wait for what these read."""


PACKAGES = ("whiflash_sglang/", "whiflash_cpu/", "whiflash_kernels/", "sglang/srt/")


class HostReads(TorchFunctionMode):
    """Counts reads and uploads by the line of ours, or of SGLang's, that asked for them.

    uploads: from memory that was made as pinned, be it so or not. pageable: others, for which the host waits as it does
    for reads. of_kernels: the same of what stands in for a GPU's kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.of_kernels: Counter[str] = Counter()
        self._pinned: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        found = self._kind(name, args)
        if found is not None:
            asking = f"{site()} {name}"
            found = self.of_kernels if asking.startswith(STAND_INS) or in_reference() else found
            found[asking] += 1
        result = func(*args, **kwargs)
        if "pin_memory" in kwargs:
            self._pinned[result.data_ptr()] = result
        return result

    def _kind(self, name: str, args: Sequence[Any]) -> Counter[str] | None:
        """Counter of a call of `name`, if it is counted."""
        if args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() in self._pinned:
            return self.uploads if name == "to" else None
        if name in READS or depends_on_values(name, args):
            return None if _says_host() else self.reads
        return self.pageable if name in UPLOADS or assigns_number(name, args) else None


def depends_on_values(name: str, args: Sequence[Any]) -> bool:
    """Indexing by a mask, and `where` with a condition alone, have as many results as there are true values."""
    if name == "where":
        return len(args) == 1
    if name not in ("__getitem__", "__setitem__"):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in index)


def assigns_number(name: str, args: Sequence[Any]) -> bool:
    """Whether one element becomes a number of Python's: torch copies it, where it fills what has any dimension."""
    if name != "__setitem__" or not isinstance(args[2], int | float):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return len(index) == args[0].dim() and all(isinstance(part, int) for part in index)


def _says_host() -> bool:
    """Whether the line that asks reads what SGLang calls `..._cpu`: its copies on the host are the CPU's here, too."""
    for frame in reversed(traceback.extract_stack()):
        if any(package in frame.filename for package in PACKAGES):
            return "_cpu." in (frame.line or "")
    return False
