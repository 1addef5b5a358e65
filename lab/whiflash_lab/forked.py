"""A process that imports SGLang once and forks servers; `whiflash_lab.servers` starts and talks to it.

A server is three processes (HTTP server, scheduler, detokeniser), each of which spends half a minute of a core on
importing SGLang. Forked ones have everything imported. They are those of `python -m sglang.launch_server`, with `fork`
in place of `spawn` for their children.

Protocol: a JSON object a line on stdin (`arguments`, `environment`, `log`), the pid of the forked server on stdout.
At the end of stdin every server ends.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import traceback
from importlib import import_module
from typing import Any, TextIO

PRELOADED = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
    "sglang.srt.speculative.dflash_worker_v2",
    "sglang.srt.speculative.eagle_worker_v2",
)
"""Modules that the three processes import, for any speculative algorithm."""


def serve(request: dict[str, Any]) -> None:
    """Run a server in the forked child, in a session of its own, with its output in a file. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, stream)
    os.environ.update(request["environment"])
    code = 1
    try:
        import torch
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args

        threads = request["environment"].get("OMP_NUM_THREADS")
        if threads is not None:  # OpenMP read it for the host, when torch was imported.
            torch.set_num_threads(int(threads))
        load_plugins()
        run_server(prepare_server_args(request["arguments"]))
        code = 0
    except SystemExit as left:
        # The interpreter would print the exit's text, `os._exit` does not.
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def host(requests: TextIO, answers: TextIO) -> None:
    """Fork a server for each request until there are no more, then end them all."""
    # SGLang asks for `spawn`, which would import everything again in each child.
    set_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = (  # type: ignore[assignment]
        lambda method, force=False: set_method("fork", force=True)
    )
    # Servers need these modules, none of which starts a thread or a device when it is imported.
    for name in PRELOADED:
        import_module(name)
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.get_supported_archs()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Servers that end leave no zombies.
    print("ready", file=answers, flush=True)
    servers = []
    try:
        for line in requests:
            request = json.loads(line)  # noqa: TID251  (its owner wrote it)
            servers.append(os.fork())
            if servers[-1] == 0:
                answers.close()
                requests.close()
                serve(request)
            print(servers[-1], file=answers, flush=True)
    finally:
        for pid in servers:
            for kill in (os.killpg, os.kill):  # A child that was just forked leads no group yet.
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SGLang's output during its import must not be read as an answer.
    host(os.fdopen(os.dup(0)), said)
    os._exit(0)  # The interpreter's normal exit would unload modules for seconds.
