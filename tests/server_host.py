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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from whiflash_lab import servers

SMALL = ("--device", "cpu", "--max-total-tokens", "8000", "--max-running-requests", "8")
STAND_INS = str(Path(__file__).parent / "parallel" / "stand_ins")
"""Folder of packages that servers import in place of those that need another machine."""


class Server(servers.Server):
    """A running server. ``post`` and ``get`` talk to it; ``close`` ends it and all its processes at once."""

    ends_by = signal.SIGKILL

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except BaseException as error:
            error.add_note(self.log.read_text(errors="replace")[-4000:])
            raise

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

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


class ServerHost(servers.Closing):
    """The process that has imported SGLang and forks servers. Threads may start servers at the same time."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="server-host-")
        self._servers: list[Server] = []
        self._numbers = itertools.count()
        paths = os.pathsep.join(filter(None, (STAND_INS, os.environ.get("PYTHONPATH"))))
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self._host = servers.ServerHost(environment, cwd=Path(self._directory.name))

    def running(self, *args: str, env: Mapping[str, str] | None = None, threads: int = 1) -> Server:
        """A server with ``args`` beside :data:`SMALL`, which runs inside its context.

        Args:
            env: variables that SGLang reads after its import.
            threads: that a forward computes with.
        """
        log = Path(self._directory.name) / f"server-{next(self._numbers)}.log"
        variables = {"OMP_NUM_THREADS": str(threads), **(env or {})}
        server = Server([*SMALL, *args], host=self._host, env=variables, log=log)
        self._servers.append(server)
        return server

    def start(self, *args: str, env: Mapping[str, str] | None = None, threads: int = 1) -> Server:
        """The same, running: until it is closed, or the host is."""
        return self.running(*args, env=env, threads=threads).__enter__()

    def close(self) -> None:
        for server in self._servers:
            server.close()
        self._host.close()
        self._directory.cleanup()


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

    def __init__(self, host: ServerHost, arguments: Sequence[str], kept: dict[tuple[str, ...], Server]) -> None:
        self._host, self._arguments, self._kept = host, tuple(arguments), kept

    @property
    def url(self) -> str:
        return self._kept[self._arguments].url

    def __enter__(self) -> "Forked":
        if self._arguments not in self._kept:
            self._kept[self._arguments] = self._host.start(*self._arguments)
        elif "--whiflash-router" in self._arguments:
            router = self._arguments[self._arguments.index("--whiflash-router") + 1]
            self._kept[self._arguments].post("/whiflash/policy", {"router": router})
        return self

    def close(self) -> None:
        pass
