"""One case of every kernel under compute-sanitizer: `python tests/gpu/sanitized.py memcheck cuda figures.json [OP,OP]`.

Sizes are small and odd, so that masks are at work. `start` is what a server launches before the first request, for up
to 64 of them. Memory is not cached by torch meanwhile, or a read beyond a tensor would be one of a neighbour. On a CPU
Triton's interpreter runs the cases, up to 3 requests of `start`, within the bounds of `kernels/tests/kernel_bounds.py`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels" / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from checks import Checks

UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "WHIFLASH_KERNELS": "triton"}


def cases(device: str, ops: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The first case of each op, or of `ops`, by its name."""
    import torch
    from cases import KERNELS, Bench, CaseSizes, catch_up_cases
    from shapes import SHAPES

    shape = replace(SHAPES["smollm2-135m"], vocab=1_003, hidden=64, intermediate=96, captured=3)
    shape = replace(shape, dflash_chunks=(0, 2), eagle3_chunks=(0, 1, 2), router_units=24)
    bench = Bench(shape, torch.device(device), 4, CaseSizes((3,), (3,), (5,), 131))
    seen = set[str]()
    for case in (case for family in (*KERNELS, catch_up_cases) for case in family(bench)):
        if case.op not in seen and case.op in (ops or [case.op]):
            seen.add(case.op)
            yield case.op, case.call
    if "start" in (ops or ["start"]):
        from test_warm import served
        from whiflash_kernels.warm import launch_all

        yield "start", partial(launch_all, served(64 if device == "cuda" else 3, {17}, 1))


def bounds(device: str) -> AbstractContextManager[None]:
    if device == "cuda":
        return nullcontext()
    from kernel_bounds import bounded

    return bounded()


def main() -> int:
    tool, device, out, *chosen = sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:]
    if tool == "none":
        checks = Checks(out)
        with bounds(device):
            for name, call in cases(device, chosen[0].split(",") if chosen else []):
                with checks.check(name):
                    call()
                    if device == "cuda":
                        import torch

                        torch.cuda.synchronize()
        return checks.exit_status
    sanitizer = shutil.which("compute-sanitizer")
    if device == "cuda" and sanitizer is None:
        return Checks(out).leave_out("no compute-sanitizer is on the PATH")
    under = [str(sanitizer), "--tool", tool, "--error-exitcode", "1"] if device == "cuda" else []
    environment = os.environ | UNCACHED | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    return subprocess.call([*under, sys.executable, __file__, "none", device, str(out), *chosen], env=environment)


if __name__ == "__main__":
    sys.exit(main())
