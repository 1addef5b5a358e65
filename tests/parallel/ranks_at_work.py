"""Several processes that serve one model: each is a scheduler stepped by hand (`engine.py`), forked from this one.

    outputs = on_ranks(2, partial(serve, models))   # `serve(rank, port)` in each; what it returned, by rank

They are the ranks of a server but for HTTP and mail: what a test hands to one it hands to all. One that fails ends the
others, which may wait for it.
"""

import gc
import os
import pickle
import selectors
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tensor_parallel import BIND

from whiflash_sglang.server import free_port


class RankFailedError(AssertionError):
    """A rank raised; the message is its traceback."""


def on_ranks(size: int, work: Callable[[int, int], Any]) -> list[Any]:
    """`work(rank, port)` in `size` processes at once, that meet at a port. What each returned, by rank.

    Raises:
        RankFailedError: of the first that failed.
    """
    port, found = free_port(), {}
    pids, waiting = [], selectors.DefaultSelector()
    try:
        for rank in range(size):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                _child(writing, lambda rank=rank: work(rank, port))
            os.close(writing)
            pids.append(pid)
            waiting.register(reading, selectors.EVENT_READ, (rank, bytearray()))
        while waiting.get_map():
            for key, _ in waiting.select():
                rank, answer = key.data
                part = os.read(key.fd, 1 << 20)
                answer += part
                if part:
                    continue
                waiting.unregister(key.fd)
                os.close(key.fd)
                if not answer:
                    raise RankFailedError(f"rank {rank} ended without a word")
                right, found[rank] = pickle.loads(answer)
                if not right:
                    raise RankFailedError(f"rank {rank}:\n{found[rank]}")
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for key in list(waiting.get_map().values()):
            os.close(int(key.fd))
        waiting.close()
    return [found[rank] for rank in range(size)]


def _child(writing: int, work: Callable[[], Any]) -> None:
    """Does not return: what a test runner does at its end is not to be done twice."""
    try:
        # What earlier tests left is not this process's to collect: threads that it belonged to are not here.
        gc.freeze()
        os.environ.update(BIND)
        answer = (True, work())
    except BaseException:
        answer = (False, traceback.format_exc())
    with os.fdopen(writing, "wb") as pipe:
        pickle.dump(answer, pipe)
    os._exit(0)
