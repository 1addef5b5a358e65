"""The servers of a benchmark, or of the demo, are forked by one process, which imports SGLang once."""

import io
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from rich.console import Console

from whiflash_lab.bench import command, fleet
from whiflash_lab.bench.fleet import Fleet
from whiflash_sglang.files.progress import Lines

WANTED: dict[str, list[str]] = {"plain": ["--served-model-name", "a"], "ours": ["--served-model-name", "b"]}
HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


class Host:
    """In the place of the process that forks: what it forks are healthy and nothing else."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self.asked: list[Sequence[str]] = []
        self.waited = self.over = False

    def wait(self) -> None:
        assert not self.asked
        self.waited = True

    def fork(self, arguments: Sequence[str], log: Path, env: Mapping[str, str]) -> int:
        self.asked.append(arguments)
        line = [sys.executable, "-c", HEALTHY, arguments[arguments.index("--port") + 1]]
        return subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL).pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.over = True


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Host]]:
    """The processes that were asked to import SGLang."""
    made: list[Host] = []

    def make(*given: Any) -> Host:
        made.append(Host(*given))
        return made[-1]

    monkeypatch.setattr(fleet, "ServerHost", make)
    monkeypatch.setattr(fleet, "serves_here", lambda: True)
    return made


def test_they_are(hosts: list[Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()

    class Runner:
        def __init__(self, plan: Any, fleet: Fleet, *_: Any) -> None:
            self._fleet = fleet

        def run(self) -> dict[str, str]:
            return self._fleet.start(WANTED)

    monkeypatch.setattr(command, "Runner", Runner)
    monkeypatch.setattr(command, "progress", lambda: Lines(Console(file=out, width=200)))
    plan: Any = SimpleNamespace(recorded=())
    failed: Any = command.run(plan)
    assert failed == {}
    [host] = hosts
    assert host.waited
    assert host.over
    assert sorted(list(asked[-2:]) for asked in host.asked) == sorted(WANTED.values())
    assert out.getvalue().startswith("importing SGLang, once for ")
