"""Whose line it was: of what runs on a model of the device, which line of ours or of SGLang's asked for it."""

import sys
from traceback import walk_stack
from typing import Any

PACKAGES = ("whiflash_sglang/", "whiflash_kernels/", "sglang/srt/", "sglang/kernels/")
OWN = ("sites.py", "streams.py", "host_reads.py", "watching.py", "card.py", "graphs.py", "op_tape.py")


def site() -> str:
    """The innermost line of ours or of SGLang's; of a test where there is none."""
    frame = calling_frame()
    name = frame.f_code.co_filename
    package = next((p for p in PACKAGES if p in name), "/")
    return f"{package.lstrip('/')}{name.rsplit(package, 1)[-1]}:{frame.f_lineno}"


def in_reference() -> bool:
    """Whether this is the body of an op of ours, for which a GPU has a kernel. The op's check, and what launches the
    kernel, run on a GPU's host, too.
    """
    frames = [frame for frame, _ in walk_stack(sys._getframe())]
    ops = [f for f in frames if f.f_code.co_filename.endswith("whiflash_kernels/dispatch.py")]
    bodies = {f.f_locals["reference"].__code__ for f in ops if "reference" in f.f_locals}
    return any(f.f_code in bodies for f in frames)


def calling_frame() -> Any:
    frame: Any = sys._getframe(1)
    caller = None
    while frame is not None:
        name = frame.f_code.co_filename
        if any(package in name for package in PACKAGES):
            return frame
        if caller is None and "/torch/" not in name and name.rsplit("/", 1)[-1] not in OWN:
            caller = frame
        frame = frame.f_back
    return caller
