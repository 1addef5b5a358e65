"""Verifications of several widths, as SGLang's attention backends plan them: in a child, under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import sampled

HERE = Path(__file__).parent
CHEAP = "several_windows or room_for or every_backend or left_to"
SAMPLE = "interpreted_windows.py", f"ragged and wide and triton or {CHEAP}"
RUNS = (SAMPLE, ("interpreted_windows.py", ""), ("interpreted_mla.py", ""), ("interpreted_recurrent.py", ""))


@pytest.mark.parametrize(("file", "chosen"), sampled(RUNS, SAMPLE))
def test_what_attention_backends_plan_for_a_verification(file: str, chosen: str) -> None:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / file), "-k", chosen, "-p", "no:cacheprovider"],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout
