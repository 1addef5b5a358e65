"""Real SGLang servers for tests, several configurations for the price of one import: those of the package's own host
(``whiflash_lab.servers``), which imports SGLang once and forks.

Tests share one: the fixture `host`.

    with host.running("--model-path", str(model), "--dtype", "float32") as server:
        server.post("/generate", {"text": "Hello", "sampling_params": {"temperature": 0}})
"""

import itertools
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
from patience import wait_until

from whiflash_lab import servers
from whiflash_lab.servers import free_port, listens, runs

SMALL = (
    "--device",
    "cpu",
    "--host",
    "127.0.0.1",
    "--max-total-tokens",
    "8000",
    "--max-running-requests",
    "8",
)
STAND_INS = str(Path(__file__).parent / "parallel" / "stand_ins")
"""Folder of packages that servers import in place of those that need another machine."""


class Server:
    """A running server. ``post`` and ``get`` talk to it; ``stop`` ends it and all its processes."""

    def __init__(self, pid: int, port: int, log: Path) -> None:
        self.pid = pid
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def scheduler(self, title: str) -> psutil.Process:
        """Its scheduler's process of one rank or replica, by what SGLang calls it: `_TP1`, `_DP0`."""
        children = psutil.Process(self.pid).children(recursive=True)
        [found] = [child for child in children if title in " ".join(child.cmdline())]
        return found

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST ``body`` as JSON and return the JSON answer; raises httpx.HTTPStatusError on an error status."""
        return httpx.post(self.url + path, json=body, timeout=None).raise_for_status().json()

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=None).raise_for_status().json()

    def generate(self, **body: Any) -> Any:
        """One answer of the native API, greedy unless ``sampling_params`` say otherwise."""
        body["sampling_params"] = {"temperature": 0, "ignore_eos": True} | body.get("sampling_params", {})
        return self.post("/generate", body)

    def generate_all(self, bodies: Sequence[dict[str, Any]], *, concurrency: int) -> list[Any]:
        """Answers to ``bodies`` in order, ``concurrency`` of them in flight at a time."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda body: self.generate(**body), bodies))

    @property
    def ready(self) -> bool:
        """Whether it has served its warm-up request. Another server may have taken the port: that one is not asked."""
        return any(listens(pid, self.port) for pid in self._family()) and answers(self.url + "/health")

    def wait_until_ready(self) -> None:
        """Raises:
        RuntimeError: it ended instead; carries the end of its log.
        """
        try:
            wait_until(lambda: not runs(self.pid) or self.ready)
        except BaseException as error:
            self.stop()
            error.add_note(self._tail())
            raise
        if not runs(self.pid):
            self.stop()  # what it started may outlive it
            raise RuntimeError(f"the server did not start:\n{self._tail()}")

    def stop(self) -> None:
        family = self._family()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(runs, family)))

    def _family(self) -> list[int]:
        """Its process and all that it started; which of them serves HTTP is the server's own business."""
        with suppress(psutil.NoSuchProcess):
            return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
        return [self.pid]

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


class ServerHost:
    """The process that has imported SGLang and forks servers. Threads may start servers at the same time."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="server-host-")
        self._servers: list[Server] = []
        self._numbers = itertools.count()
        paths = os.pathsep.join(filter(None, (STAND_INS, os.environ.get("PYTHONPATH"))))
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self._host = servers.ServerHost(environment, cwd=Path(self._directory.name))

    @contextmanager
    def running(self, *args: str, env: Mapping[str, str] | None = None, threads: int = 1) -> Iterator[Server]:
        """A server that is stopped at the end, as :meth:`start` starts it."""
        server = self.start(*args, env=env, threads=threads)
        try:
            yield server
        finally:
            server.stop()

    def start(self, *args: str, env: Mapping[str, str] | None = None, threads: int = 1) -> Server:
        """Fork a server with ``args`` beside :data:`SMALL` and wait until it has served its warm-up request.

        Args:
            env: variables that SGLang reads after its import.
            threads: that a forward computes with.

        Raises:
            RuntimeError: it ended instead; carries the end of its log.
        """
        server = self._fork(args, {"OMP_NUM_THREADS": str(threads), **(env or {})})
        server.wait_until_ready()
        return server

    def _fork(self, args: Sequence[str], env: Mapping[str, str]) -> Server:
        port, log = free_port(), Path(self._directory.name) / f"server-{next(self._numbers)}.log"
        server = Server(self._host.fork([*SMALL, "--port", str(port), *args], log, env), port, log)
        self._servers.append(server)
        return server

    def close(self) -> None:
        for server in self._servers:
            server.stop()
        self._host.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=None).is_success
    except httpx.TransportError:
        return False


class Forked:
    """A server of the host, started when a fleet asks for it.

    kept: servers by arguments. One that is there is used again, under the policy that it began with, and none is
        stopped: whoever made the table does that.
    """

    def __init__(
        self, host: ServerHost, arguments: Sequence[str], kept: dict[tuple[str, ...], Server] | None = None
    ) -> None:
        self._host, self._arguments, self._kept = host, tuple(arguments), kept
        self._server: Server | None = None

    @property
    def base_url(self) -> str:
        assert self._server is not None
        return self._server.url

    def __enter__(self) -> "Forked":
        self._server = (self._kept or {}).get(self._arguments)
        if self._server is None:
            self._server = self._host.start(*self._arguments)
        elif "--whiflash-router" in self._arguments:
            router = self._arguments[self._arguments.index("--whiflash-router") + 1]
            self._server.post("/whiflash/policy", {"router": router})
        if self._kept is not None:
            self._kept[self._arguments] = self._server
        return self

    def close(self) -> None:
        if self._server is not None and self._kept is None:
            self._server.stop()
