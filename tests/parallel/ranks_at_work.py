"""Several processes that serve one model: each is a scheduler stepped by hand (`engine.py`).

    outputs = on_ranks(2, partial(serve, models))   # `serve(rank, port)` in each; what it returned, by rank

They are the ranks of a server but for HTTP and mail: what a test hands to one it hands to all. One that fails ends the
others, which may wait for it. They are forked from a process of their own that has imported SGLang and done nothing
else: what earlier tests left in this one, locks of threads that a fork leaves behind among it, would stop them.
"""

import atexit
import os
import pickle
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from whiflash_lab.servers import free_port

Work = Callable[[int, int], Any]

_hosts: list[subprocess.Popen[bytes]] = []
"""The process that ranks are forked from, once it is needed."""


class RankFailedError(AssertionError):
    """A rank raised; the message is its traceback."""


def on_ranks(size: int, work: Work) -> list[Any]:
    """`work(rank, port)` in `size` processes at once, that meet at a port. Returns their results, by rank.

    `work` is pickled: a function of a module that needs no pytest, or a partial of one.

    Raises:
        RankFailedError: that of the first that failed.
    """
    host = _hosts[0] if _hosts else _start()
    assert host.stdin is not None
    assert host.stdout is not None
    try:
        pickle.dump((size, work), host.stdin)
        host.stdin.flush()
        right, found = pickle.load(host.stdout)
    except BaseException:
        _stop()
        raise
    if not right:
        raise RankFailedError(found)
    return list(found)


def _start() -> subprocess.Popen[bytes]:
    begin = f"import sys; sys.path[:] = {sys.path!r}; import ranks_at_work; ranks_at_work.serve()"
    host = subprocess.Popen([sys.executable, "-c", begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _hosts.append(host)
    atexit.register(_stop)
    return host


def _stop() -> None:
    while _hosts:
        host = _hosts.pop()
        host.kill()
        host.communicate()


def serve() -> None:
    """The process that ranks are forked from: work on standard input, what came of it on standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            size, work = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, _forked(size, work))
        except RankFailedError as error:
            answer = (False, str(error))
        pickle.dump(answer, answers)
        answers.flush()


def _forked(size: int, work: Work) -> list[Any]:
    port, found = free_port(), {}
    pids, waiting = [], selectors.DefaultSelector()
    # Nothing is asked meanwhile: what comes from there is the end of whoever asked.
    waiting.register(0, selectors.EVENT_READ)
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
        while len(found) < size:
            for key, _ in waiting.select():
                if key.fd == 0:
                    raise KeyboardInterrupt
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
            if key.fd:
                os.close(int(key.fd))
        waiting.close()
    return [found[rank] for rank in range(size)]


def _child(writing: int, work: Callable[[], Any]) -> None:
    """Does not return: what a test runner does at its end is not to be done twice."""
    try:
        answer = (True, work())
    except BaseException:
        answer = (False, traceback.format_exc())
    with os.fdopen(writing, "wb") as pipe:
        pickle.dump(answer, pipe)
    os._exit(0)
