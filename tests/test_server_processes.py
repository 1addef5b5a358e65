"""Questions of the launcher to a server's process, which may end at any moment."""

import random
import subprocess
import sys

import psutil
import pytest

from whiflash_lab.servers import Server, free_port, listens


@pytest.mark.parametrize("error", [psutil.NoSuchProcess, psutil.AccessDenied])
def test_a_process_that_has_just_ended_does_not_listen(
    error: type[psutil.Error], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files belong to root until its parent waits for it, so others than root may not look."""

    def ended(self: psutil.Process, kind: str) -> None:
        raise error(self.pid)

    monkeypatch.setattr(psutil.Process, "net_connections", ended)
    assert not listens(psutil.Process().pid, 1)


def test_no_two_processes_are_given_the_same_port() -> None:
    """Servers of both start for a while before they bind theirs."""
    ask = "import random; from whiflash_lab.servers import free_port; random.seed(7); print(free_port())"
    random.seed(7)
    mine = free_port()
    assert int(subprocess.check_output([sys.executable, "-c", ask])) != mine


def test_a_server_that_cannot_be_spawned_leaves_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/missing/python")
    server = Server([])
    with pytest.raises(FileNotFoundError), server:
        pass
    assert not server.log.exists()
