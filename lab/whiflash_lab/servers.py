"""Starts servers as processes that never outlive their owner. Imports no SGLang.

Servers that share one import of SGLang (`ServerHost`) start in seconds; several take as long as one.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx
import psutil

from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.cpu import CHILD_ENVIRONMENT


class Closing:
    """A context manager that calls its own `close` at the end of the block."""

    def close(self) -> None:
        """Free nothing: a class that holds something says how to free it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Running(Closing):
    """A server that runs already, at `url`: entering starts nothing, and leaving ends nothing."""

    def __init__(self, url: str) -> None:
        self.url = url


class ServerHostError(WhiflashError):
    """The process that forks servers ended. The message ends with the last lines of its output."""


class ServerHost(Closing):
    """A process that has imported SGLang and forks servers on a CPU (`serves_here`).

    Leaving it, or the end of its owner, ends every server. Threads may fork at the same time.

    Args:
        env: additions to the environment. OpenMP reads its variables when torch is imported, so they belong here and
            not to a server; but for `OMP_NUM_THREADS`, which a server may have of its own.
        cwd: working directory of the servers, the owner's where there is none.
    """

    def __init__(self, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._log = Path(tempfile.mkstemp(prefix="whiflash-host-", suffix=".log")[1])
        self._asking = threading.RLock()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "whiflash_lab.forked"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # The platform sets these for the processes it spawns; here they are needed before torch is imported.
                cwd=cwd,
                env={**CHILD_ENVIRONMENT, **os.environ, **(env or {})},
                # Ctrl-C reaches the owner alone, and the owner ends the servers.
                start_new_session=True,
            )
        self._ready = False

    @property
    def pid(self) -> int:
        """Id of the process that forks."""
        return self._process.pid

    def wait(self) -> None:
        """Wait until SGLang is imported, which takes half a minute or more.

        Raises:
            ServerHostError: it cannot be imported.
        """
        with self._asking:
            if not self._ready:
                self._answer()
                self._ready = True

    def fork(self, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> int:
        """Fork a server. Return its process id, which is also its session's id.

        Args:
            arguments: of `sglang.launch_server`. log: takes its output. env: additions to the environment.

        Raises:
            ServerHostError: the host has ended.
        """
        request = {"arguments": list(arguments), "log": str(log.absolute()), "environment": dict(env or {})}
        # One question and its answer at a time: a thread that read another's would stop the wrong server.
        with self._asking:
            self.wait()
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None  # started with pipes
        answer = self._process.stdout.readline()
        if not answer:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise ServerHostError(f"SGLang could not be imported (exit code {self._process.wait()}):\n{last}")
        return answer

    def close(self) -> None:
        """End the host and every server. Safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        if not self._ready:  # The host would finish its imports before it sees the closed pipe.
            self._process.kill()
        self._process.wait()
        self._log.unlink(missing_ok=True)


class ServerError(WhiflashError):
    """The server did not start, or died. The message ends with the last lines of its log."""


_reserved = list[socket.socket]()
"""UDP sockets on ports given out: a server that starts has not bound its TCP port yet, and other processes ask, too."""


def free_port() -> int:
    """Return a free TCP port, below those that SGLang picks (22000 to 29999) and the system gives to connections.

    It is a multiple of eight, so that the ports that SGLang derives for DP attention (233 to 239 more) are free, too.

    Raises:
        ServerError: there is none.
    """
    for port in random.sample(range(10000, 21760, 8), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _reserved.append(socket.socket(type=socket.SOCK_DGRAM))
            _reserved[-1].bind(("127.0.0.1", port))
            return port
    raise ServerError("no free TCP port between 10000 and 21760")


def listens(pid: int, port: int) -> bool:
    """Whether the process itself, not another one, listens on the TCP port."""
    # A process that has just ended belongs to root until its parent waits for it.
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        sockets = psutil.Process(pid).net_connections("inet")
        return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)
    return False


def runs(pid: int) -> bool:
    """Whether the process exists and has not ended; a zombie counts as ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


class Server(Closing):
    """`python -m sglang.launch_server` with `arguments`, on the loopback interface.

    Use as a context manager. Entering it waits until the server is ready or has ended; leaving it, by whatever way,
    ends the server and all its children.

    Args:
        arguments: flags after `--host` and `--port`.
        host: fork the server from there, with SGLang imported; None: start a new interpreter.
        env: additions to the environment.
        log: where its output goes; None: a temporary file that is removed at the end.
    """

    ends_by = signal.SIGTERM

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        host: ServerHost | None = None,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = ["--host", "127.0.0.1", "--port", str(self.port), *arguments]
        self._host = host
        self._env = dict(env or {})
        self._keep_log = log is not None
        self.log = log or Path(tempfile.mkstemp(prefix="whiflash-server-", suffix=".log")[1])
        self._process: psutil.Process | None = None

    def __enter__(self) -> Self:
        try:
            self._process = self._spawn() if self._host is None else self._fork(self._host)
            self._wait_until_ready(self._process)
        except BaseException:
            self.close()
            raise
        return self

    def _spawn(self) -> psutil.Process:
        with self.log.open("ab") as log:
            # A session of its own, so that Ctrl-C reaches the owner alone and the owner ends the tree.
            return psutil.Popen(
                [sys.executable, "-m", "sglang.launch_server", *self._arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._env},
                start_new_session=True,
            )

    def _fork(self, host: ServerHost) -> psutil.Process:
        pid = host.fork(self._arguments, self.log, self._env)
        try:
            return psutil.Process(pid)
        except psutil.NoSuchProcess:
            raise ServerError(f"the server stopped:\n{self.tail()}") from None

    @property
    def pids(self) -> list[int]:
        """Ids of the server's process and of all its descendants."""
        if self._process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._process.pid, *(child.pid for child in self._process.children(recursive=True))]
        return []

    def tail(self) -> str:
        """Return the last lines of the server's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def close(self) -> None:
        """End the server and everything it started. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            self._end(process)
        if not self._keep_log:
            self.log.unlink(missing_ok=True)

    def _end(self, process: psutil.Process) -> None:
        tree = [process]
        with contextlib.suppress(psutil.NoSuchProcess):
            tree += process.children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, self.ends_by)  # its children may outlive it
        try:
            psutil.wait_procs(tree, timeout=5)
        finally:  # also where the wait is interrupted
            for survivor in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    survivor.kill()
        psutil.wait_procs(tree)

    def _wait_until_ready(self, process: psutil.Process) -> None:
        """Wait without a limit until the server is ready or ends: a busy machine imports SGLang for minutes."""
        with httpx.Client(base_url=self.url, timeout=None) as client:
            while True:
                if not runs(process.pid):
                    raise ServerError(f"the server stopped:\n{self.tail()}")
                with contextlib.suppress(httpx.HTTPError):
                    if any(listens(pid, self.port) for pid in self.pids) and client.get("/health").is_success:
                        return
                time.sleep(0.25)
