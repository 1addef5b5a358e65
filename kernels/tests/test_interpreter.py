"""Runs this folder's Triton tests under Triton's interpreter, in a child process.

The interpreter must be chosen before Triton is first imported, and would change every kernel of this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_backends import DEVICE, INTERPRETING

HERE = Path(__file__).parent


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels run on the GPU itself")
@pytest.mark.skipif(INTERPRETING, reason="this is the child process")
def test_triton_tests_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    selection = ["-k", "triton", "-m", "not aot", "-p", "no:cacheprovider", "-x"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE), *selection],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout
