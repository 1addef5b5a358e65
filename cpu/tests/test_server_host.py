"""The host of the tests' servers: a failed start is told at once, nobody else's server is taken for ours."""

import os
from pathlib import Path

import psutil
import pytest
from chat_app import answering
from patience import wait_until
from server_host import ServerHost, answers

from whiflash_lab import servers
from whiflash_sglang.files.cpu import CHILD_ENVIRONMENT

from .conftest import Checkpoints

pytestmark = pytest.mark.server


def test_a_server_that_dies_is_reported_with_its_log(host: ServerHost, tmp_path: object) -> None:
    with pytest.raises(servers.ServerError, match=f"stopped(.|\n)*{tmp_path}"):
        host.start("--model-path", f"{tmp_path}/nothing")


def test_another_server_on_the_port_is_not_ours(
    host: ServerHost, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(lambda *_: (200, b"{}")) as url:
        monkeypatch.setattr(servers, "free_port", lambda: int(url.rpartition(":")[2]))
        assert answers(f"{url}/health")
        with pytest.raises(servers.ServerError, match="stopped"):
            host.start(*checkpoints.arguments)


def test_openmp_is_told_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawned scheduler gets these from the platform; in the host torch is there before any platform is."""
    for name in CHILD_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    own = next(iter(CHILD_ENVIRONMENT))
    with servers.ServerHost({"OMP_NUM_THREADS": "3", own: "mine"}) as running:
        # The kernel shows them a moment after the process was started.
        wait_until(lambda: psutil.Process(running.pid).environ())
        found = psutil.Process(running.pid).environ()
    assert found["OMP_NUM_THREADS"] == "3"
    assert found[own] == "mine", "what the user sets stays"
    assert {name: found[name] for name in CHILD_ENVIRONMENT} == {**CHILD_ENVIRONMENT, own: "mine"}
    assert not psutil.pid_exists(running.pid), "it ends with its owner's interest, imported or not"


def test_a_host_that_cannot_import_says_why(tmp_path: Path) -> None:
    (tmp_path / "sglang.py").write_text("raise ImportError('no such engine')")
    with servers.ServerHost({"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}) as running:
        with pytest.raises(servers.ServerHostError, match="no such engine"):
            running.wait()
        with pytest.raises(servers.ServerHostError, match="no such engine"):
            running.fork([], tmp_path / "log")
