"""Packages that `make demo` leaves out on a CPU are none that torch is linked with; lines beyond a budget are named."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from loaded_scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_nothing_is_left_out_that_torch_is_linked_with() -> None:
    """Its build for CUDA needs two of CUDA's libraries on a CPU, too; another machine may have them elsewhere."""
    torch = distribution("torch")
    libraries = {file.name: Path(file.locate()) for file in torch.files or () if file.parent.name == "lib"}
    open_, needed = ["libtorch_global_deps.so", "libtorch_python.so"], set[str]()
    while open_:
        dump = ["readelf", "-d", libraries[open_.pop()]]
        told = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        for name in {*re.findall(r"\(NEEDED\).*\[(.+)\]", told)} - needed:
            needed.add(name)
            open_ += [name] if name in libraries else []
    assert "libtorch_cpu.so" in needed
    for package in (ROOT / "docs" / "cpu-leaves-out.txt").read_text("utf-8").split():
        try:
            brought = {file.name for file in distribution(package).files or ()}
        except PackageNotFoundError:
            continue
        assert not brought & needed, f"{package} is left out"


def test_lines_and_records_beyond_their_budget_are_named(tmp_path: Path) -> None:
    for name, text in (("grown", "a\n" * 1300), ("small", "a\n"), ("fresh", "")):
        (tmp_path / "whiflash_sglang" / name).mkdir(parents=True)
        (tmp_path / "whiflash_sglang" / name / "__init__.py").write_text(text)
    script = load_script("budgets")
    known = len(script.records())
    budgets = '[lines]\n"whiflash_sglang/grown" = 1200\n"whiflash_sglang/small" = 1\ngone = 5\n[records]\nserver = '
    (tmp_path / "budgets.toml").write_text(f"{budgets}{known - 1}\n")
    assert [line.partition(". ")[0] for line in script.over(tmp_path)] == [
        "whiflash_sglang/grown: 1,300 lines, budget 1,200",
        "gone: no Python, budget 5",
        "whiflash_sglang/fresh: no budget",
        f"server: {known} record types, budget {known - 1}",
    ]
    (tmp_path / "budgets.toml").write_text(f"{budgets}{known}\n")
    assert not any(line.startswith("server") for line in script.over(tmp_path))
    assert "whiflash_sglang.records.core:Round" in script.records()
    (tmp_path / "scripts").mkdir()
    copy = shutil.copy(ROOT / "scripts" / "budgets.py", tmp_path / "scripts")
    (tmp_path / "budgets.toml").write_text(budgets.partition("[records]")[0])
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for branch, code in (("main", 1), ("topic", 0)):
        subprocess.run(["git", "symbolic-ref", "HEAD", f"refs/heads/{branch}"], cwd=tmp_path, check=True)
        done = subprocess.run([sys.executable, copy], env={}, capture_output=True, text=True, check=False)
        assert (done.returncode, "::warning::" in done.stdout) == (code, not code)
