"""Verifications of several widths, as SGLang's attention backends plan them: in a child, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import sampled

HERE = Path(__file__).parent
FILES = (
    "interpreted_attention.py",
    "interpreted_mla.py",
    "interpreted_recurrent.py",
    "interpreted_windows.py",
)


@pytest.mark.parametrize("file", sampled(FILES, "interpreted_attention.py"))
def test_what_attention_backends_plan_for_a_verification(file: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / file), "-p", "no:cacheprovider"],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout
