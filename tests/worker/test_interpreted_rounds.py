"""Whole rounds on the GPU's attention and kernels, without a GPU: in a child, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_rounds_on_sglangs_triton_attention_and_our_kernels() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    selection = [str(HERE / "interpreted_rounds.py"), "-p", "no:cacheprovider", "-x", "--evidence"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *selection],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout
