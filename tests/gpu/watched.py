"""Rounds and passes of a running engine, watched: what they wait for, what memory they take, what they launch.

On a CPU each watcher runs the same code with what a CPU has in its place, so that a rehearsal meets every line.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import psutil
import torch
from sites import site
from streams import Streams
from torch.overrides import TorchFunctionMode
from watching import Functions

STEADY = 6
"""Rounds of a run before those that are watched: by then every drafter has drafted and nothing is new."""
RUNTIME = ("cuda", "cu")
"""How the names of the driver's own calls begin in a trace."""
NAMED = 100
"""Characters of an operator's name that are kept."""
WAIT = "called a synchronizing CUDA operation"
"""How torch's warning of a wait begins; the mode's own first notice says "synchronizing", too."""
ROWS_ON_HOST = "whiflash_sglang/engine/scheduler/spec_worker.py"
"""`row_ids_of` reads `req_pool_indices_cpu`, which is the host's on a GPU."""


class Rounds:
    """Counts a worker's rounds, and runs those behind the first under `watch`.

    replayed: rounds whose verification was a graph's. full: only rounds of as many requests are watched.
    """

    def __init__(self, worker: Any, watch: Callable[[], AbstractContextManager[Any]], full: int = 1) -> None:
        self._round, self._watch, self._full = worker._round, watch, full
        self.seen = self.watched = self.replayed = 0

    def __call__(self, batch: Any, *rest: Any) -> Any:
        self.seen += 1
        steady = self.seen > STEADY and len(batch.reqs) >= self._full
        with self._watch() if steady else nullcontext():
            done = self._round(batch, *rest)
        self.watched += steady
        self.replayed += bool(done.can_run_cuda_graph)
        return done

    def figures(self) -> dict[str, int]:
        assert self.watched, f"only {self.seen} rounds: none was steady"
        return {"rounds": self.seen, "watched": self.watched, "replayed": self.replayed}


@contextmanager
def watching(
    worker: Any, watch: Callable[[], AbstractContextManager[Any]] = nullcontext, full: int = 1
) -> Iterator[Rounds]:
    """The worker's rounds under `watch` for a while."""
    rounds = Rounds(worker, watch, full)
    with patch.object(worker, "_round", rounds):
        yield rounds


@contextmanager
def stepping(e: Any, watch: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Whole passes of an engine's scheduler under `watch`: prefills, rounds, results, releases and aborts."""
    step = e.step

    def watched() -> Any:
        with watch():
            return step()

    with patch.object(e, "step", watched):
        yield


@contextmanager
def unoverlapped(e: Any) -> Iterator[Counter[bool]]:
    """Passes of a scheduler, by whether their last result had to be processed first."""
    asked, seen = e.scheduler.is_disable_overlap_for_batch, Counter[bool]()

    def counted(*args: Any, **named: Any) -> Any:
        disabled = asked(*args, **named)
        seen[bool(disabled)] += 1
        return disabled

    with patch.object(e.scheduler, "is_disable_overlap_for_batch", counted):
        yield seen


class Pageable(TorchFunctionMode):
    """Copies to the device from memory that is not pinned, by the line that asks: `seen`.

    The driver stages them, so the host waits though they say `non_blocking`, of which CUDA warns nobody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if name in ("to", "cuda", "copy_", "__setitem__") and args:
            into, source = (args[0], args[-1]) if name in ("copy_", "__setitem__") else (out, args[0])
            if name == "copy_":
                source = args[1]
            both = isinstance(source, torch.Tensor) and isinstance(into, torch.Tensor)
            if both and into.is_cuda and not source.is_cuda and not source.is_pinned():
                self.seen[site()] += 1
        return out


class Waits:
    """Waits of the host for the device: by CUDA's own account, which warns; on a CPU by what torch is asked for.

    A copy to the device from memory that is not pinned is a wait, too. Waits of SGLang's own lines are not counted.
    `set_sync_debug_mode` is `warn` and not `error`, so that all waits of a pass are found and not its first.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.found: Counter[str] = Counter()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._device == "cpu":
            world = Streams()
            with Functions(world):
                yield
            # SGLang's copies of lengths and rows on the host are tensors of this device, too.
            for found in (world.stalls, world.pageable):
                ours = (site for site in found if site.startswith("whiflash") and not site.startswith(ROWS_ON_HOST))
                self.found.update({site: found[site] for site in ours})
            return
        with warnings.catch_warnings(), Pageable() as pageable, warned(self._device):
            warnings.simplefilter("always")
            warnings.showwarning = self._shown
            yield
        self.found.update({at: n for at, n in pageable.seen.items() if at.startswith("whiflash")})

    def _shown(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """Counts a wait by the line that asked for it: the warning names the mode's own frame, `Pageable`'s."""
        if str(message).startswith(WAIT) and not (at := site()).startswith("sglang/"):
            self.found[at] += 1


@contextmanager
def warned(device: str) -> Iterator[None]:
    """CUDA warns of each wait; the phantom card has its own account."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Memory:
    """Bytes that rounds take at their peak beyond what was allocated when each began; on a CPU the process's."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.most = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = self._bytes(peak=False)
        yield
        self.most = max(self.most, self._bytes(peak=True) - before)

    def _bytes(self, *, peak: bool) -> int:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return int(psutil.Process().memory_info().rss)


class Trace:
    """Torch's profiler over rounds. Use as a context manager around all of them, then ask for `figures`."""

    def __init__(self, device: str) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities)

    def figures(self, rounds: int, top: int = 24) -> dict[str, Any]:
        """Figures of one of `rounds` rounds: driver calls, and the dearest operators on device and host, in ms."""
        events = [e for e in self.profile.key_averages() if not e.is_user_annotation]
        calls = {e.key: e.count / rounds for e in events if e.key.startswith(RUNTIME)}

        def dearest(attribute: str) -> dict[str, float]:
            spent = {e.key[:NAMED]: getattr(e, attribute) / 1000 / rounds for e in events}
            return dict(sorted(spent.items(), key=lambda item: -item[1])[:top])

        return {
            "driver_calls": calls,
            "device_ms": sum(e.self_device_time_total for e in events) / 1000 / rounds,
            "host_ms": sum(e.self_cpu_time_total for e in events) / 1000 / rounds,
            "on_device": dearest("self_device_time_total"),
            "on_host": dearest("self_cpu_time_total"),
        }
