"""The servers of a run: started at once or one by one, stopped whatever happens."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType

import httpx
from rich.progress import Progress

from whiflash_lab.bench.arms import SEVERAL
from whiflash_lab.bench.load import ANSWER_SECONDS
from whiflash_lab.servers import Closing, Server, ServerHost
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.cpu import serves_here
from whiflash_sglang.files.hosts import LIMITS
from whiflash_train.provenance import threads

Make = Callable[[Sequence[str], Path | None, Path | None], Server]
"""Arguments, log file and checkout of the project (None: this one) to a server that is not started yet."""


def environment(arguments: Sequence[str]) -> dict[str, str]:
    """Environment of a server with `arguments`: its ranks and replicas share the threads that it may use."""
    sizes = [int(arguments[arguments.index(flag) + 1]) for flag in SEVERAL.values() if flag in arguments]
    return {"OMP_NUM_THREADS": str(max(threads() // prod(sizes), 1))}


def launcher(
    arguments: Sequence[str],
    log: Path | None,
    checkout: Path | None = None,
    *,
    host: ServerHost | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Server:
    """A server with as many threads as every other, among all its ranks, forked by `host` where there is one.

    more: variables of its environment.

    A checkout's server is a process of its own: what `host` has imported is this one's. It runs from the checkout's
    sources: they go before what `PYTHONPATH` names, and the working directory, which may be this checkout, is left out.
    Its environment is the checkout's own (`.venv`) where there is one, which its entry points may need, else this one.
    """
    env = {**environment(arguments), **more}
    if checkout is None:
        return Server(arguments, host=host, log=log, env=env)
    sources = [str(checkout / folder) for folder in ("", "cpu", "kernels", "sdk")]
    env["PYTHONPATH"] = os.pathsep.join([*sources, *filter(None, [os.environ.get("PYTHONPATH")])])
    env["PYTHONSAFEPATH"] = "1"
    python = checkout / ".venv" / "bin" / "python"
    return Server(arguments, log=log, env=env, python=python if python.is_file() else None)


class Fleet(Closing):
    """Running servers by key.

    Args:
        log_dir: keep the servers' logs there.
    """

    def __init__(self, make: Make = launcher, log_dir: Path | None = None) -> None:
        self._make, self._log_dir = make, log_dir
        self._servers: dict[str, Server] = {}
        self.clients: dict[str, httpx.Client] = {}

    def start(
        self,
        arguments_by_key: Mapping[str, Sequence[str]],
        on_start: Callable[[str, str | None], None] = lambda key, reason: None,
        checkouts: Mapping[str, Path] | None = None,
    ) -> dict[str, str]:
        """Start servers at the same time: arguments by key. Returns what did not start, and why.

        Args:
            on_start: called for each as it is ready or has failed, in another thread: its key, and why it did not
                start. checkouts: of the project, by key, where a server is not this one's.
        """
        for key, arguments in arguments_by_key.items():
            log = None if self._log_dir is None else self._log_dir / f"{key.replace(' ', '-')}.log"
            self._servers[key] = self._make(arguments, log, (checkouts or {}).get(key))
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
                # Threads wait for servers that nobody wants any more; without them they end by themselves.
                for key in arguments_by_key:
                    self._servers[key].close()
                raise
        for key in failed:
            del self._servers[key]
        for key in arguments_by_key.keys() - failed.keys():
            self.clients[key] = httpx.Client(base_url=self.url(key), timeout=ANSWER_SECONDS, limits=LIMITS)
        return failed

    def url(self, key: str) -> str:
        return self._servers[key].url

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
def fleet_of(
    bar: Progress, log_dir: Path | None, more: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Fleet]:
    """Servers, forked from one process that has imported SGLang if they can share it; they end with the block.

    Args:
        more: as of `launcher`.
    """
    with ExitStack() as stack:
        host = None
        if serves_here():
            importing = bar.add_task("importing SGLang, once for all servers", total=None)
            host = stack.enter_context(ServerHost({"OMP_NUM_THREADS": str(threads())}))
            host.wait()
            bar.remove_task(importing)
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        yield stack.enter_context(Fleet(partial(launcher, host=host, more=more), log_dir))


def reason_of(message: str) -> str:
    """The line of a failed start's log that says why: the last exception, else the last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or "error:" in line]
    return (errors or lines or ["no output"])[-1].lstrip("- ")[:300]
