"""Starts the servers of a run, at once or one by one, and stops them whatever happens."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
from rich.progress import Progress

from whiflash_lab.bench.load import ANSWER_SECONDS
from whiflash_lab.servers import Closing, Running, Server, ServerHost
from whiflash_sglang.errors import UsageError, WhiflashError
from whiflash_sglang.files.cpu import serves_here
from whiflash_sglang.files.hosts import LIMITS
from whiflash_sglang.files.provenance import threads

Make = Callable[[Sequence[str], Path | None], Server | Running]
"""Makes a server that is not started yet, from arguments and log file."""

SEVERAL = (("--tp-size", "--tp", "--tensor-parallel-size"), ("--dp-size", "--dp", "--data-parallel-size"))
"""Flags that start several ranks or replicas."""


def size_of(arguments: Sequence[str], *flags: str) -> int | None:
    """Return the last number that these flags have in a server's arguments, None without one. Raises UsageError."""
    size = None
    for flag, value in pairwise([*arguments, ""]):
        if flag in flags:
            if not re.fullmatch(r"0*[1-9]\d{0,8}", value):
                raise UsageError(f"--server-args {flag} {value}: give a whole number from 1")
            size = int(value)
    return size


def environment(arguments: Sequence[str]) -> dict[str, str]:
    """Return a server's environment: its ranks and replicas share the server's threads. Raises as `size_of` does."""
    sizes = [size_of(arguments, *flags) or 1 for flags in SEVERAL]
    return {"OMP_NUM_THREADS": str(max(threads() // prod(sizes), 1))}


class Fleet(Closing):
    """The running servers by key, with a client for each.

    Args:
        log_dir: keep the servers' logs there. headers: of every request.
    """

    def __init__(
        self, make: Make, log_dir: Path | None = None, headers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._make, self._log_dir, self._headers = make, log_dir, headers
        self._servers: dict[str, Server | Running] = {}
        self.clients: dict[str, httpx.Client] = {}

    def start(
        self,
        arguments_by_key: Mapping[str, Sequence[str]],
        on_start: Callable[[str, str | None], None] = lambda key, reason: None,
    ) -> dict[str, str]:
        """Start servers at the same time. Return by key why a server did not start.

        Args:
            on_start: called in another thread when a server is ready or has failed, with its key and the reason why it
                did not start, or None.
        """
        for key, arguments in arguments_by_key.items():
            log = None if self._log_dir is None else self._log_dir / f"{key.replace(' ', '-')}.log"
            self._servers[key] = self._make(arguments, log)
        failed: dict[str, str] = {}

        def start(key: str) -> None:
            try:
                self._servers[key].__enter__()
            except WhiflashError as error:
                failed[key] = reason_of(str(error))
            on_start(key, failed.get(key))

        with ThreadPoolExecutor(max(len(arguments_by_key), 1)) as pool:
            try:
                list(pool.map(start, arguments_by_key))
            except BaseException:
                # The pool's threads still wait for these servers, and end once the servers are closed.
                for key in arguments_by_key:
                    self._servers[key].close()
                raise
        for key in failed:
            del self._servers[key]
        for key in arguments_by_key.keys() - failed.keys():
            self.clients[key] = httpx.Client(**self.reach(key))
        return failed

    def reach(self, key: str) -> dict[str, Any]:
        """Return the arguments of a client of this server."""
        url = self._servers[key].url
        return {"base_url": url, "headers": self._headers, "timeout": ANSWER_SECONDS, "limits": LIMITS}

    def stop(self, key: str) -> None:
        self.clients.pop(key).close()
        self._servers.pop(key).close()

    def close(self) -> None:
        with ExitStack() as closing:  # also what is left when one of them is interrupted
            for server in self._servers.values():
                closing.callback(server.close)
            for client in self.clients.values():
                closing.callback(client.close)
            self.clients.clear()
            self._servers.clear()


@contextmanager
def fleet_of(bar: Progress, log_dir: Path | None, more: Mapping[str, str] = MappingProxyType({})) -> Iterator[Fleet]:
    """Yield a fleet whose servers end with the block. On a CPU they are forked from one process that imported SGLang.

    Args:
        more: variables of the servers' environment.
    """
    host: ServerHost | None = None

    def make(arguments: Sequence[str], log: Path | None) -> Server:
        return Server(arguments, host=host, log=log, env={**environment(arguments), **more})

    with ExitStack() as stack:
        if serves_here():
            importing = bar.add_task("importing SGLang, once for all servers", total=None)
            host = stack.enter_context(ServerHost({"OMP_NUM_THREADS": str(threads())}))
            host.wait()
            bar.remove_task(importing)
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        yield stack.enter_context(Fleet(make, log_dir))


def reason_of(message: str) -> str:
    """Return the line of a failed start's log that says why: the last exception, else the last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or "error:" in line]
    return (errors or lines or ["no output"])[-1].lstrip("- ")[:300]
