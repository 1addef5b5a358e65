"""Questions of the launcher to a server's process, which may end at any moment."""

import psutil
import pytest

from whiflash_lab.servers import listens


@pytest.mark.parametrize("error", [psutil.NoSuchProcess, psutil.AccessDenied])
def test_a_process_that_has_just_ended_does_not_listen(
    error: type[psutil.Error], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files belong to root until its parent waits for it, so others than root may not look."""

    def ended(self: psutil.Process, kind: str) -> None:
        raise error(self.pid)

    monkeypatch.setattr(psutil.Process, "net_connections", ended)
    assert not listens(psutil.Process().pid, 1)
