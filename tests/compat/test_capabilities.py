"""Capabilities name only what the server drafts from on its device."""

from types import SimpleNamespace
from typing import Any

import pytest

from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.compat.http.routes import _prediction_tokens


@pytest.mark.parametrize(
    ("device", "resident", "enabled", "expected"),
    [("cpu", "0", True, 500), ("cuda", "0", True, 0), ("cpu", "1", True, 0), ("cpu", "0", False, 0)],
    ids=["CPU", "CUDA", "device-resident CPU", "without the copying arm"],
)
def test_predictions_are_advertised_where_they_draft(
    monkeypatch: pytest.MonkeyPatch, device: str, resident: str, enabled: bool, expected: int
) -> None:
    monkeypatch.setenv("WHIFLASH_DEVICE_RESIDENT", resident)
    settings: Any = SimpleNamespace(lookup=Lookup(enabled=enabled, prediction_tokens=500))
    assert _prediction_tokens(settings, device) == expected
