"""Timing, the ceilings that times are compared with, and the origin of a result."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from whiflash_sglang.files.provenance import busy, made_by

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Quantiles of one call, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of a GPU, from which `floor_us` computes the shortest time of an op."""

    copy_bytes_per_second: float
    """Bytes read plus bytes written by a copy that fills the chip."""
    matmul_flops_per_second: float
    launch_us: float
    """One call that moves one element: no op is faster."""

    def floor_us(self, moved_bytes: int, flops: int) -> float:
        """Return the microseconds that any implementation needs: to move the bytes, to compute, or for one launch."""
        moving, computing = moved_bytes / self.copy_bytes_per_second, flops / self.matmul_flops_per_second
        return max(1e6 * moving, 1e6 * computing, self.launch_us)


def time_call(call: Call, device: torch.device, budget_ms: int = 200) -> Timing:
    """Time ``call``: with device events and a cold cache on a GPU, in processor time of one thread on a CPU.

    Processor time leaves out other processes of a shared machine. For one thread that nothing interrupts, it equals
    wall-clock time.
    """
    if device.type == "cuda":
        # do_bench empties the L2 cache before every run; that also hides the host's launch time.
        times = triton.testing.do_bench(call, warmup=50, rep=budget_ms, quantiles=[0.5, 0.1, 0.9])
        return Timing(*(1e3 * t for t in times))
    for _ in range(3):
        call()
    samples: list[float] = []
    stop = time.perf_counter() + 1e-3 * budget_ms
    while len(samples) < 10 or time.perf_counter() < stop:
        start = time.thread_time()
        call()
        samples.append(1e6 * (time.thread_time() - start))
    tenths = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), tenths[0], tenths[-1])


def ceilings(device: torch.device) -> Ceilings:
    """Measure the copy bandwidth, the bf16 product rate and the shortest call of a GPU."""
    source = torch.randn(1 << 28, device=device).to(torch.bfloat16).repeat(2)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device)
    side = 8192
    a = torch.randn(side, side, device=device).bfloat16()
    product = time_call(lambda: a @ a, device)
    one = torch.zeros(1, device=device)
    return Ceilings(
        copy_bytes_per_second=2 * source.nbytes / (1e-6 * copy.median_us),
        matmul_flops_per_second=2 * side**3 / (1e-6 * product.median_us),
        launch_us=time_call(lambda: one.zero_(), device).median_us,
    )


def provenance() -> dict[str, str]:
    """Return the facts that are stored with every result."""
    made = made_by(("torch", "triton"))
    return {
        "command": " ".join(["python", "kernels/bench/" + made["command"][0], *made["command"][1:]]),
        "revision": made["revision"] + " with local changes" * made["uncommitted_changes"],
        **made["packages"],
        "cuda": torch.version.cuda or "none",
        "python": made["python"],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": f"{made['hardware']['cpu']}, {torch.get_num_threads()} of {os.cpu_count()} threads",
        "load": f"{busy()['load_1min']:.1f} (one-minute average at the start)",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
