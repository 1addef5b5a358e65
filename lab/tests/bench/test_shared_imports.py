"""The servers of a benchmark, or of the demo, are forked by one process, which imports SGLang once."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from whiflash_lab.bench import fleet
from whiflash_sglang.files.progress import Lines


def test_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    done, out = list[str](), io.StringIO()
    host = SimpleNamespace(wait=lambda: done.append("imported"))

    @contextmanager
    def made(environment: dict[str, str]) -> Iterator[Any]:
        yield host
        done.append("ended")

    monkeypatch.setattr(fleet, "ServerHost", made)
    monkeypatch.setattr(fleet, "serves_here", lambda: True)
    with fleet.fleet_of(Lines(Console(file=out, width=200)), None) as servers:
        assert servers._make(["--tp-size", "1"], None)._host is host
        assert done == ["imported"]
    assert done == ["imported", "ended"]
    assert out.getvalue().startswith("importing SGLang, once for ")
