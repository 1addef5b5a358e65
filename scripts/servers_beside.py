"""A plain server and one of WHIFLASH, which scripts ask alike; where a request ends one, another takes its place."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from whiflash_sglang.cli.serve import server_arguments, server_environment
from whiflash_sglang.serving import Server, ServerHost, runs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ARGUMENTS = ("--max-running-requests", "8", "--max-total-tokens", "20000", "--device", "cpu")
FLAGS = ("--enable-return-hidden-states", "--enable-streaming-session")


@contextmanager
def address(given: str | None) -> Iterator[str]:
    """The URL of the server that was given; else of one on the embedded model, which ends with the block."""
    if given is not None:
        yield given
        return
    flags = ["--context-length", "4096"]
    with Server(server_arguments(flags), env=server_environment(flags)) as server:
        yield server.base_url


class Renewed:
    """A server with these arguments, and another one in its place where a request has ended it."""

    def __init__(self, arguments: list[str], host: ServerHost) -> None:
        self._start = partial(Server, arguments, host=host)
        self._running = ExitStack()

    def __enter__(self) -> "Renewed":
        self._server = self._running.enter_context(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def lives(self) -> bool:
        pids = self._server.pids
        return bool(pids) and all(map(runs, pids))

    def end(self) -> None:
        """The next one that asks has another server."""
        self._running.close()

    @property
    def server(self) -> Server:
        """One that lives."""
        if not self.lives:
            self.end()
            self._server = self._running.enter_context(self._start())
        return self._server


def arguments_of(tiny: bool, root: Path) -> tuple[str, list[str], list[str]]:
    """The model, what both servers are given, and what WHIFLASH's is given beside."""
    ours = ["--speculative-algorithm", "WHIFLASH", "--whiflash-router", "random"]
    if not tiny:
        from whiflash_sglang.checkpoints.manifest import embedded_bundle
        from whiflash_sglang.embedded import ensure_target

        model = str(ensure_target())
        return model, [*ARGUMENTS, *FLAGS], [*ours, "--speculative-draft-model-path", str(embedded_bundle())]
    from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

    target = tiny_target(root / "target", peaked=True)
    drafters = ["--speculative-draft-model-path", str(tiny_dflash(root / "d", target))]
    drafters += ["--whiflash-eagle-draft", str(tiny_eagle3(root / "e", target))]
    return str(target), [*ARGUMENTS, *FLAGS, "--dtype", "float32"], [*ours, *drafters]
