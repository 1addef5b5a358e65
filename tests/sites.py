"""Whose line it was: of what runs on a model of the device, which line of ours or of SGLang's asked for it."""

import sys
from functools import cache
from typing import Any

PACKAGES = ("whiflash_sglang/", "whiflash_cpu/", "whiflash_kernels/", "sglang/srt/", "sglang/kernels/")
OWN = ("sites.py", "streams.py", "watching.py", "card.py", "graphs.py", "op_tape.py")


def site() -> str:
    """The innermost line of ours or of SGLang's; of a test where there is none."""
    frame = calling_frame()
    return _line(frame.f_code.co_filename, frame.f_lineno)


@cache
def _line(name: str, number: int) -> str:
    package = next((p for p in PACKAGES if p in name), "/")
    return f"{package.lstrip('/')}{name.rsplit(package, 1)[-1]}:{number}"


def in_reference() -> bool:
    """Whether this is the body of an op of ours, for which a GPU has a kernel. The op's check, and what launches the
    kernel, run on a GPU's host, too.
    """
    frame: Any = sys._getframe(1)
    inside = set[int]()
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith("whiflash_kernels/dispatch.py"):
            reference = frame.f_locals.get("reference")
            if reference is not None and id(reference.__code__) in inside:
                return True
        inside.add(id(code))
        frame = frame.f_back
    return False


def calling_frame() -> Any:
    frame: Any = sys._getframe(1)
    caller = None
    while frame is not None:
        in_package = _in_package(frame.f_code.co_filename)
        if in_package:
            return frame
        if caller is None and in_package is False:
            caller = frame
        frame = frame.f_back
    return caller


@cache
def _in_package(name: str) -> bool | None:
    """Whether a file is of `PACKAGES`; None if it is torch's or of the models, which nobody looks for."""
    if any(package in name for package in PACKAGES):
        return True
    return None if "/torch/" in name or name.rsplit("/", 1)[-1] in OWN else False
