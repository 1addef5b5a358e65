"""The origin of a result is recorded, and secrets of the command that made it are not."""

from pathlib import Path

import pytest

from whiflash_sglang.files.provenance import checkout, made_by


def test_a_key_or_a_password_is_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # nor is git needed
    keys = ["--api-key", "K3Y one", "--api-key=K3Y", "--url", "http://K3Y:K3Y@host:30000"]
    flags = ["--server-args", "--tp-size 2 --admin-api-key 'K3Y one' --api-key K3Y --ssl-keyfile-password=K3Y -x"]
    monkeypatch.setattr("sys.argv", ["/bin/whiflash", "learn", "/var/lib/x", *keys, *flags])
    made = made_by(())
    said = ["--api-key", "***", "--api-key=***", "--url", "http://***@host:30000", "--server-args"]
    assert made["command"][:-1] == ["whiflash", "learn", "x", *said]
    assert made["command"][-1] == "--tp-size 2 --admin-api-key *** --api-key *** --ssl-keyfile-password=*** -x"
    assert made["revision"] == ""


def test_an_environment_inside_a_checkout_has_no_revision() -> None:
    assert checkout(Path(pytest.__file__).parent) == {"revision": "", "uncommitted_changes": False}
    assert checkout(Path(__file__).parent)["revision"]
