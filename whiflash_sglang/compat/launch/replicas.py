"""The process that hands requests to the replicas of `--dp-size`: it notices when one of them ends.

SGLang's HTTP process watches its children and ends the server when one of them crashes. Replicas are the controller's
children, which SGLang does not watch: if one is killed from outside, its requests wait for ever. So the
controller watches them as the HTTP process does its own, and ends as it does on any error of its own: it logs the error
and signals the HTTP process, which ends the server.
"""

import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

import psutil
from sglang.srt.managers import data_parallel_controller
from sglang.srt.utils.watchdog import SubprocessWatchdog

from whiflash_sglang.compat.carried import asks_for_ours
from whiflash_sglang.compat.patching import around, install
from whiflash_sglang.serving import ReplicaDiedError, ended


@around(
    "sglang.srt.entrypoints.engine:run_data_parallel_controller_process",
    params=("server_args",),
    why="no plugin of ours is asked in the controller's process",
    until="SGLang's controller watches its replicas",
    makes=True,
)
def _controller(original: Any) -> Any:
    """The controller's process installs its watch."""
    return run


def run(server_args: Any, **others: Any) -> None:
    """The controller's process, as SGLang starts it."""
    if asks_for_ours(server_args):
        install(sys.modules[__name__])
    data_parallel_controller.run_data_parallel_controller_process(server_args, **others)


@around(
    "sglang.srt.managers.data_parallel_controller:DataParallelController.event_loop",
    why="requests of a replica that was killed wait for ever",
    until="SGLang's controller watches its replicas",
)
def _watching(original: Any, self: Any) -> None:
    """The server ends where a replica ends."""
    if not asks_for_ours(self.server_args):
        original(self)
        return
    processes = list(self.scheduler_procs)
    titles = [_title(process.pid) for process in processes]

    def fail(*_: Any) -> None:
        raise ReplicaDiedError(_crashed(processes, titles), len(self.workers))

    # Sent by the watchdog, and by a replica that has raised an error: that one may not have ended yet.
    signal.signal(signal.SIGQUIT, fail)
    SubprocessWatchdog(processes, titles).start()
    original(self)


def _title(pid: int) -> str:
    """Title of a scheduler's process, the only place that shows its rank: `sglang::scheduler_DP1_TP0`."""
    try:
        return " ".join(psutil.Process(pid).cmdline()).strip()
    except psutil.Error:
        return ""


def _crashed(processes: Sequence[Any], titles: Sequence[str]) -> list[str]:
    crashed = []
    for process, title in zip(processes, titles, strict=True):
        if process.exitcode:
            rank = re.search(r"_DP(\d+)", title)
            crashed.append(ended(int(rank[1]) if rank else None, process.pid, process.exitcode))
    return crashed
