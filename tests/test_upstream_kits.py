"""`scripts/upstream_kits.py` runs each test in a process of its own, and goes on behind those that do not end."""

import os
import threading
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loaded_scripts import load_script
from patience import wait_until

script = load_script("upstream_kits")


class Kit(unittest.TestCase):
    __test__ = False  # run below, by the script
    hung: Path
    base_url: str

    def test_a_never_ends(self) -> None:
        self.hung.touch()
        threading.Event().wait()

    def test_b_passes(self) -> None:
        assert self.base_url == "http://1"  # the second server: the first ended with the test before

    def test_c_fails(self) -> None:
        self.fail("said | so")

    def test_d_ends_its_process(self) -> None:
        os._exit(3)

    def test_e_leaves_a_thread_behind(self) -> None:
        threading.Thread(target=threading.Event().wait).start()


class Servers:
    """Replacement of servers: how many were started, with which flags."""

    def __init__(self) -> None:
        self.started: list[tuple[str, ...]] = []
        self.lives = False

    def __call__(self, flags: tuple[str, ...]) -> "Servers":
        self.flags = flags
        return self

    @property
    def server(self) -> Any:
        if not self.lives:
            self.started.append(self.flags)
        self.lives = True
        return SimpleNamespace(base_url=f"http://{len(self.started) - 1}")

    def close(self) -> None:
        self.lives = False

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Servers:
    hung = tmp_path / "hung"

    def within(seconds: float, over: Any) -> bool:
        """The time of a test is over when it hangs."""
        wait_until(lambda: over(0.02) or hung.exists())
        if not hung.exists():
            return True
        hung.unlink()
        return False

    def class_of(kit: str, fields: dict[str, Any]) -> type[unittest.TestCase]:
        return type(kit.partition(":")[2], (Kit,), {**fields, "hung": hung})

    monkeypatch.setattr(script, "within", within)
    monkeypatch.setattr(script, "_class_of", class_of)
    monkeypatch.setattr(script, "KITS", {"some:Kit": ()})
    return Servers()


EXPECTED = {
    "test_a_never_ends": "failed: not over within 600 s of a quiet machine",
    "test_b_passes": "passed",
    "test_c_fails": "failed: AssertionError: said \\| so",
    "test_d_ends_its_process": "failed: its process ended with 3",
    "test_e_leaves_a_thread_behind": "passed",
}


def test_what_became_of_each(servers: Servers, capfd: pytest.CaptureFixture[str]) -> None:
    found: dict[str, str] = {}
    saved: list[int] = []
    script.run(servers, "tiny", ["some:Kit"], found, lambda: saved.append(len(found)))
    assert found == {f"Kit.{name}": became for name, became in EXPECTED.items()}
    assert servers.started == [(), ()]
    assert saved == [1, 2, 3, 4, 5]
    assert "in test_a_never_ends" in capfd.readouterr().err  # where it stood
