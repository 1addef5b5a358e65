"""Faults that are planted by hand still fit the kernels that they are planted in, and leave none of them out."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from planted import planted

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "kernels" / "whiflash_kernels" / "triton_kernels").glob("*.py"))
FEWEST = 3


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_has_faults_that_are_programs(path: Path) -> None:
    source = path.read_text()
    found = planted(str(path), source)
    names = [(mutant.part, mutant.name) for mutant in found]
    assert len(set(names)) == len(names)
    for mutant in found:
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(source)), mutant.name
    by_kernel = Counter(mutant.part for mutant in found)
    kernels = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and "_kernel" in n.name]
    assert all(by_kernel[kernel] >= FEWEST for kernel in kernels), by_kernel


def test_a_fault_whose_text_is_gone_is_an_error() -> None:
    [path] = [path for path in KERNELS if path.stem == "router"]
    with pytest.raises(ValueError, match=r"_shares_kernel.*0 times"):
        planted(str(path), path.read_text().replace("hidden_stride", "row_stride"))
