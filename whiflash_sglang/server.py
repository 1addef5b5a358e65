"""A server as a child process that never outlives its owner. Used by the demo, the benchmark and the tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from whiflash_sglang.errors import WhiflashError

START_SECONDS = 300
"""A cold import of SGLang alone takes half a minute on a busy machine."""


class ServerError(WhiflashError):
    """The server did not start, or died. The message ends with the last lines of its log."""


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`python -m sglang.launch_server` with `arguments`, on the loopback interface.

    Use as a context manager; leaving it, by whatever way, ends the server and all its children.

    Args:
        arguments: flags after `--host` and `--port`.
        env: additions to the environment.
        log: where its output goes; None: a temporary file that is removed at the end.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._arguments = list(arguments)
        self._env = {**os.environ, **(env or {})}
        self._keep_log = log is not None
        self.log = log or Path(tempfile.mkstemp(prefix="whiflash-server-", suffix=".log")[1])
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        with self.log.open("ab") as log:
            # A session of its own, so that Ctrl-C reaches the owner alone and the owner ends the tree.
            self._process = subprocess.Popen(
                command + self._arguments,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._env,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The server's process and all its descendants."""
        if self._process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            return [parent.pid, *(child.pid for child in parent.children(recursive=True))]
        return []

    def tail(self, lines: int = 15) -> str:
        """The last lines of the server's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End the server and everything it started. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(process.pid)
            children = tree.children(recursive=True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            _, alive = psutil.wait_procs([tree, *children], timeout=5)
            for survivor in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    survivor.kill()
            psutil.wait_procs(alive, timeout=5)
        process.wait()
        if not self._keep_log:
            self.log.unlink(missing_ok=True)

    def _wait_until_ready(self) -> None:
        process = self._process
        if process is None:
            raise AssertionError("started just above")
        deadline = time.monotonic() + self._start_seconds
        with httpx.Client(base_url=self.base_url, timeout=2) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise ServerError(
                        f"the server stopped with exit code {process.returncode}:\n{self.tail()}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health").status_code == 200:
                        return
                time.sleep(0.25)
        raise ServerError(f"the server was not ready after {self._start_seconds:.0f} s:\n{self.tail()}")
