"""The SDK is Python 3.10's, wherever the tests run; `test_matrix.py` runs it there where it can be had."""

from pathlib import Path

import pytest

import whiflash_sdk


@pytest.mark.evidence
def test_the_standard_library_of_python_3_10_has_what_is_used(tmp_path: Path) -> None:
    """By typeshed, which knows since when every name exists."""
    api = pytest.importorskip("mypy.api")
    options = ["--python-version", "3.10", "--config-file", "", "--follow-imports", "silent"]
    options += ["--ignore-missing-imports", "--cache-dir", str(tmp_path)]
    stdout, stderr, status = api.run([*options, str(Path(whiflash_sdk.__file__).parent)])
    assert status == 0, stdout + stderr
