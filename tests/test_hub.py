"""Hub ids: revision, download directory and ModelScope reach the hub's own function."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from whiflash_sglang.checkpoints.hub import fetch
from whiflash_sglang.errors import ConfigError

Calls = list[tuple[str, str | None, str | None]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Calls of the hub's download function, which gives `tmp_path`."""
    calls: Calls = []

    def download(path: str, *, revision: str | None = None, cache_dir: str | None = None) -> str:
        calls.append((path, revision, cache_dir))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_revision_and_directory_are_passed_on(asked: Calls, tmp_path: Path) -> None:
    assert fetch("owner/name") == tmp_path
    assert fetch("owner/name", revision="v2", download_dir="/data") == tmp_path
    assert asked == [("owner/name", None, None), ("owner/name", "v2", "/data")]


def test_modelscope_where_sglang_uses_it(asked: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(ConfigError, match=r"owner/name: SGLANG_USE_MODELSCOPE is set, but .* unset"):
        fetch("owner/name")
    found: list[Any] = []
    module = ModuleType("modelscope.hub.snapshot_download")
    module.snapshot_download = lambda path, **given: found.append((path, given)) or str(tmp_path)  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert fetch("owner/name", revision="v2", download_dir="/data") == tmp_path
    assert found == [("owner/name", {"revision": "v2", "cache_dir": "/data"})]
    assert asked == []


def test_a_hub_that_has_nothing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Mock(side_effect=OSError("first line\nsecond line"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing)
    with pytest.raises(ConfigError, match=r"^owner/name at revision v2: .* the hub gave nothing \(first line\): check"):
        fetch("owner/name", revision="v2")
