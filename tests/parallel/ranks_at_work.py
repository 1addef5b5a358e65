"""Several processes that serve one model: each is a scheduler stepped by hand (`engine.py`).

    outputs = on_ranks(2, partial(serve, models))   # `serve(rank, port)` in each; what it returned, by rank

They are the ranks of a server but for HTTP and mail: what a test hands to one it hands to all. One that fails ends the
others, which may wait for it. They are forked from a process of their own that has imported SGLang and done nothing
else: what earlier tests left in this one, locks of threads that a fork leaves behind among it, would stop them.
"""

import os
import pickle
import threading
import traceback
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from whiflash_lab.servers import free_port

Work = Callable[[int, int], Any]

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["sglang.srt.managers.scheduler", "sglang.srt.models.registry"])


class RankFailedError(AssertionError):
    """A rank raised; the message is its traceback."""


def on_ranks(size: int, work: Work) -> list[Any]:
    """`work(rank, port)` in `size` processes at once, that meet at a port. Returns their results, by rank.

    `work` is pickled: a function of a module that needs no pytest, or a partial of one.

    Raises:
        RankFailedError: that of the first that failed.
    """
    port, found, waiting = free_port(), dict[int, Any](), dict[Any, int]()
    processes = []
    try:
        for rank in range(size):
            reading, writing = CONTEXT.Pipe(duplex=False)
            processes.append(CONTEXT.Process(target=_run, args=(writing, work, rank, port)))
            processes[-1].start()
            writing.close()
            waiting[reading] = rank
        while waiting:
            for reading in wait(list(waiting)):
                rank = waiting.pop(reading)
                try:
                    right, found[rank] = pickle.loads(reading.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    raise RankFailedError(f"rank {rank} ended without a word") from None
                if not right:
                    raise RankFailedError(f"rank {rank}:\n{found[rank]}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(size)]


def _run(writing: Connection, work: Work, rank: int, port: int) -> None:
    """Send what came of the work. The process ends with the one that asked."""
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    try:
        answer = (True, work(rank, port))
    except BaseException:
        answer = (False, traceback.format_exc())
    writing.send_bytes(pickle.dumps(answer))  # `send` would share tensors' memory, which ends with this process


def _end_with(asking: Any) -> None:
    asking.join()
    os._exit(1)
