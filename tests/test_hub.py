"""Hub ids of ModelScope, and a hub that has nothing. `test_cli.py` asks for Hugging Face's."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from whiflash_sglang.checkpoints.hub import fetch
from whiflash_sglang.errors import ConfigError


def test_modelscope_where_sglang_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
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


def test_a_hub_that_has_nothing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=OSError("first line\nsecond line")))
    with pytest.raises(ConfigError, match=r"^owner/name at revision v2: .* the hub gave nothing \(first line\): check"):
        fetch("owner/name", revision="v2")
