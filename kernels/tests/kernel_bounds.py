"""Bounds of memory under Triton's interpreter, which itself reads and writes at any address that it is given.

The number of an argument is put into those 16 bits of its address that no process uses. Arithmetic on pointers keeps
it, so each address is held against the argument that it was made from, also where another tensor begins behind it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

BITS = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)


class Launch:
    """The tensors of the launch that runs, by number.

    A kernel loads an address without a number from the argument `addresses`: there a tensor like `pool_like` begins.
    """

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        self.kernel, self.names = kernel, ["no argument", *tensors]
        self.numbers = {id(tensor): number for number, tensor in enumerate(tensors.values(), 1)}
        begins = [0, *(tensor.data_ptr() for tensor in tensors.values())]
        reaches = [0, *map(reach, tensors.values())]
        self.begins, self.reaches = (np.array(values, dtype=np.int64) for values in (begins, reaches))
        self.pools, self.pool_reach = np.zeros(1, dtype=np.int64), 0
        if "addresses" in tensors:
            self.pools = np.sort(tensors["addresses"].numpy().ravel())
            self.pool_reach = reach(tensors["pool_like"])

    def checked(self, access: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """The addresses that numbered ``pointers`` are, of elements of ``size`` bytes.

        Raises IndexError if one that ``mask`` does not exclude is outside of its tensor.
        """
        numbers, places = (pointers >> BITS).astype(np.int64), (pointers & ADDRESS).astype(np.int64)
        at = places - self.begins.take(numbers, mode="clip")
        outside = ((at < 0) | (at + size > self.reaches.take(numbers, mode="clip"))) & mask
        if outside.any():
            outside &= (numbers > 0) | ~self._in_pools(places, size)
        if outside.any():
            first = tuple(np.argwhere(outside)[0])
            number = int(numbers[first]) if numbers[first] < len(self.names) else 0
            raise IndexError(
                f"{self.kernel}, program {interpreter.interpreter_builder.grid_idx}: {access} of {size} bytes at "
                f"{at[first]} of {self.names[number]}, which has {self.reaches[number]}; "
                f"{outside.sum()} of {outside.size} addresses are outside"
            )
        return pointers & ADDRESS

    def _in_pools(self, places: np.ndarray, size: int) -> np.ndarray:
        at = places - self.pools[np.maximum(np.searchsorted(self.pools, places, side="right") - 1, 0)]
        return (at >= 0) & (at + size <= self.pool_reach)


def reach(tensor: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, a launch raises if one of its loads, stores or atomics leaves the tensor that its pointer is of."""
    launch, memory = Launch(), interpreter._interpreter
    to_host, to_value = interpreter.GridExecutor._init_args_hst, interpreter._implicit_cvt
    load, store, exchange, change = memory.load, memory.store, memory.atomic_cas, memory.atomic_rmw

    def begin(executor: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = to_host(executor, args, kwargs)
        launch.begin(executor.fn.__name__, dict(zip(executor.arg_names, args, strict=False)) | kwargs)
        return args, kwargs

    def value(arg: Any) -> Any:
        made = to_value(arg)
        if isinstance(arg, torch.Tensor):
            made.handle.data = made.handle.data | (np.uint64(launch.numbers[id(arg)]) << BITS)
        return made

    def checked_load(ptrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
        return load(launch.checked("a load", ptrs, mask, np.dtype(dtype).itemsize), mask, other, dtype)

    def checked_store(ptrs: Any, values: Any, mask: Any) -> Any:
        return store(launch.checked("a store", ptrs, mask, values.itemsize), values, mask)

    def checked_exchange(ptrs: Any, expected: Any, values: Any, order: Any) -> Any:
        ptrs = launch.checked("an exchange", ptrs, np.ones_like(ptrs, dtype=bool), values.itemsize)
        return exchange(ptrs, expected, values, order)

    def checked_change(op: Any, ptrs: Any, values: Any, mask: Any, order: Any) -> Any:
        return change(op, launch.checked("a change", ptrs, mask, values.itemsize), values, mask, order)

    with ExitStack() as stack:
        for place, name, replacement in (
            (interpreter.GridExecutor, "_init_args_hst", begin),
            (interpreter, "_implicit_cvt", value),
            (memory, "load", checked_load),
            (memory, "store", checked_store),
            (memory, "atomic_cas", checked_exchange),
            (memory, "atomic_rmw", checked_change),
        ):
            stack.enter_context(mock.patch.object(place, name, replacement))
        yield
