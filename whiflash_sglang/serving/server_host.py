"""Servers that share one import of SGLang: started in seconds, several for the price of one."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from whiflash_sglang.device.cpu import CHILD_ENVIRONMENT, serves_here
from whiflash_sglang.errors import WhiflashError


class ServerHostError(WhiflashError):
    """The process that forks servers ended. The message ends with the last lines of its output."""


def shares_imports() -> bool:
    """Whether servers may be forked here: not beside an accelerator, which a process that was forked cannot use."""
    return serves_here()


class ServerHost:
    """A process that has imported SGLang and forks servers, where `shares_imports`.

    Leaving it, or the end of its owner, ends every server. Threads may fork at the same time.

    Args:
        env: additions to the environment. OpenMP reads its variables when torch is imported, so they belong here and
            not to a server; but for `OMP_NUM_THREADS`, which a server may have of its own.
        cwd: working directory of the servers, the owner's where there is none.
    """

    def __init__(self, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._log = Path(tempfile.mkstemp(prefix="whiflash-host-", suffix=".log")[1])
        self._asking = threading.Lock()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "whiflash_sglang.compat.forked"],
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
        """The id of the process that forks."""
        return self._process.pid

    def wait(self) -> None:
        """Until SGLang is imported, half a minute and more.

        Raises:
            ServerHostError: it cannot be imported.
        """
        with self._asking:
            self._wait()

    def fork(self, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> int:
        """Fork a server; its process id, which is also that of its session.

        Args:
            arguments: of `sglang.launch_server`. log: takes its output. env: additions to the environment.

        Raises:
            ServerHostError: the host has ended.
        """
        request = {"arguments": list(arguments), "log": str(log.absolute()), "environment": dict(env or {})}
        # One question and its answer at a time: a thread that read another's would stop the wrong server.
        with self._asking:
            self._wait()
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._answer())

    def _wait(self) -> None:
        if not self._ready:
            self._answer()
            self._ready = True

    def _answer(self) -> str:
        if self._process.stdout is None:
            raise AssertionError("started with pipes")
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
        if not self._ready:  # It would finish its imports before it sees that nobody asks any more.
            self._process.kill()
        self._process.wait()
        self._log.unlink(missing_ok=True)

    def __enter__(self) -> "ServerHost":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
