"""Which implementation runs: Triton on CUDA tensors, the torch reference elsewhere."""

import os
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch

Backend = Literal["torch", "triton"]

_CHOICES = ("auto", "torch", "triton")


def backend_for(tensor: torch.Tensor) -> Backend:
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


def implementation(tensor: torch.Tensor, module: str) -> Any:
    """The module of that name of the implementation that serves ``tensor``'s device; Triton is imported when needed.

    Functions of both have one signature: an op calls either with its own arguments in their order.

    Raises:
        ValueError, RuntimeError: as `backend_for`.
    """
    return _module("triton_kernels" if backend_for(tensor) == "triton" else "reference", module)


@cache
def _module(package: str, name: str) -> Any:
    return import_module(f"whiflash_kernels.{package}.{name}")
