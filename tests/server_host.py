"""Real SGLang servers for tests, several configurations for the price of one import.

Importing SGLang takes a fresh server process half a minute on two cores, three times over (HTTP server, scheduler,
detokeniser). A host process imports it once and forks: the servers are the ones of ``python -m
sglang.launch_server``, with ``fork`` in place of ``spawn`` for their children, and are ready in seconds.

    with ServerHost() as host:
        server = host.start("--model-path", str(model), "--dtype", "float32")
        server.post("/generate", {"text": "Hello", "sampling_params": {"temperature": 0}})
"""

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

START_TIMEOUT_S = 240.0
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


class Server:
    """A running server. ``post`` and ``get`` talk to it; ``stop`` ends it and all its processes."""

    def __init__(self, pid: int, port: int, log: Path) -> None:
        self.pid = pid
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST ``body`` as JSON and return the JSON answer; raises httpx.HTTPStatusError on an error status."""
        return httpx.post(self.url + path, json=body, timeout=300).raise_for_status().json()

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=60).raise_for_status().json()

    def generate(self, **body: Any) -> Any:
        """One answer of the native API, greedy unless ``sampling_params`` say otherwise."""
        body["sampling_params"] = {"temperature": 0, "ignore_eos": True} | body.get("sampling_params", {})
        return self.post("/generate", body)

    def generate_all(self, bodies: Sequence[dict[str, Any]], *, concurrency: int) -> list[Any]:
        """Answers to ``bodies`` in order, ``concurrency`` of them in flight at a time."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda body: self.generate(**body), bodies))

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        wait_until(lambda: not answers(self.url), 30, f"server {self.pid} still answers after SIGKILL")


class ServerHost:
    """The process that has imported SGLang and forks servers. Threads may start servers at the same time."""

    def __init__(self, *, omp_threads: int = 1, env: dict[str, str] | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="server-host-")
        self._servers: list[Server] = []
        self._ports: set[int] = set()
        self._asking = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=self._directory.name,
            env={**os.environ, "OMP_NUM_THREADS": str(omp_threads), **(env or {})},
        )

    def start(self, *args: str) -> Server:
        """Fork a server with ``args`` beside :data:`SMALL` and wait until it has served its warm-up request.

        Raises:
            RuntimeError: it ended or did not become healthy in time; carries the end of its log.
        """
        server = self._fork(args)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(server.url + "/health"):
            if not _alive(server.pid) or time.monotonic() > deadline:
                server.stop()
                raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-4000:]}")
            time.sleep(0.2)
        return server

    def _fork(self, args: Sequence[str]) -> Server:
        """One question and its answer at a time: a thread that read another's would stop the wrong server."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise AssertionError("the host is started with pipes")
        with self._asking:
            while (port := free_port()) in self._ports:
                pass  # a server that still starts has not bound its port
            self._ports.add(port)
            log = Path(self._directory.name) / f"server-{len(self._servers)}.log"
            request = {"args": [*SMALL, "--port", str(port), *args], "log": str(log)}
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            answer = stdout.readline()
            if not answer:
                raise RuntimeError(f"the server host ended with status {self._process.wait()}")
            server = Server(int(answer), port, log)
            self._servers.append(server)
        return server

    def close(self) -> None:
        for server in self._servers:
            server.stop()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(30)
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def free_port() -> int:
    """A TCP port that was free a moment ago, below the range that the system hands to outgoing connections."""
    for port in random.sample(range(20000, 32000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free TCP port between 20000 and 32000")


def wait_until(condition: Any, timeout_s: float, message: str) -> None:
    """Poll ``condition`` until it holds; TimeoutError with ``message`` otherwise."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(message)
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30).is_success
    except httpx.TransportError:
        return False


def _alive(pid: int) -> bool:
    # The host ignores SIGCHLD, so an ended server leaves no zombie behind.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _serve(args: list[str], log: str) -> None:
    """In the forked child: become a session of its own, log to a file, run the server."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        load_plugins()
        run_server(prepare_server_args(args))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def _host() -> None:
    import multiprocessing

    # run_server asks for spawn, which would import everything again in each child.
    real = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: real("fork", force=True)  # type: ignore[assignment]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints while it is imported is no answer
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry
    import sglang.srt.speculative.dflash_worker_v2
    import sglang.srt.speculative.eagle_worker_v2

    sglang.srt.models.registry.ModelRegistry.get_supported_archs()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    servers = []
    for line in sys.stdin:
        request = json.loads(line)
        servers.append(os.fork())
        if servers[-1] == 0:
            _serve(request["args"], request["log"])
        print(servers[-1], file=answers, flush=True)
    # The tests are over, or have been killed: leave no server behind.
    for pid in servers:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    _host()
