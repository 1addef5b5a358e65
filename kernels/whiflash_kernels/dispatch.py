"""Chooses the implementation of an op: Triton on CUDA tensors, the torch reference elsewhere."""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, Literal, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["torch", "triton"]

_CHOICES = ("auto", "torch", "triton")


def backend_for(tensor: Tensor) -> Backend:
    """Return the implementation that serves ``tensor``'s device.

    ``WHIFLASH_KERNELS`` is read on every call, so it can be changed at run time: ``auto`` (default) picks
    Triton for CUDA tensors and torch for all others; ``torch`` and ``triton`` force one.

    Raises:
        ValueError: ``WHIFLASH_KERNELS`` holds anything else.
        RuntimeError: ``triton`` is forced on a tensor outside CUDA without ``TRITON_INTERPRET=1``.
    """
    choice = os.environ.get("WHIFLASH_KERNELS", "auto")
    if choice == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if choice == "torch":
        return "torch"
    if choice != "triton":
        raise ValueError(f"WHIFLASH_KERNELS={choice!r}: use one of {', '.join(_CHOICES)}")
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"WHIFLASH_KERNELS=triton needs CUDA tensors, got one on {tensor.device}: "
            "unset it, or set TRITON_INTERPRET=1 before Triton is imported to run the interpreter"
        )
    return "triton"


def op(check: Callable[..., None] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return the decorator of an op, whose body is its torch reference.

    ``check`` is called with the arguments first and raises if they do not fit. Then `implementation` runs.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        @wraps(reference)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if check is not None:
                check(*args, **kwargs)
            return implementation(reference, args)(*args, **kwargs)

        return run

    return decorate


def implementation(reference: Callable[P, R], arguments: tuple[Any, ...]) -> Callable[P, R]:
    """Return the function that runs on the device of the first tensor of ``arguments``: the reference, or its namesake
    with the same signature in the module of that name in ``triton_kernels``, which is imported when needed.

    Raises:
        ValueError, RuntimeError: from `backend_for`.
    """
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    if backend_for(tensor) == "torch":
        return reference
    kernel: Callable[P, R] = getattr(_kernels(reference.__module__.rpartition(".")[2]), reference.__name__)
    return kernel


@cache
def _kernels(module: str) -> Any:
    return import_module(f"whiflash_kernels.triton_kernels.{module}")
