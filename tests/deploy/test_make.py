"""Installs of `make`: the demo brings what a CPU needs, everything else brings everything."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from loaded_scripts import load_script

ROOT = Path(__file__).parents[2]
LEFT_OUT = (ROOT / "docs" / "cpu-leaves-out.txt").read_text("utf-8").split()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Files that the Makefile reads, on a machine with uv and without a card."""
    for name in ("Makefile", "docs/cpu-leaves-out.txt", "pyproject.toml", "uv.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (f"{part}/pyproject.toml" for part in ("cpu", "kernels", "lab", "sdk", "train")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    program(tmp_path, "uv")
    (tmp_path / "bin" / "cat").symlink_to(str(shutil.which("cat")))
    return tmp_path


def program(checkout: Path, name: str) -> None:
    path = checkout / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def sync(checkout: Path, *words: str) -> str:
    """The line that would install; empty where nothing would."""
    command = [str(shutil.which("make")), "-n", *words]
    environment = {"PATH": str(checkout / "bin")}  # and nothing that this machine may have besides
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return "".join(line for line in done.stdout.splitlines() if " sync " in line)


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
    for package in LEFT_OUT:
        try:
            brought = {file.name for file in distribution(package).files or ()}
        except PackageNotFoundError:
            continue
        assert not brought & needed, f"{package} is left out"


CPU, ALL, NOTHING = "what a CPU needs", "everything", "nothing"
CASES: list[tuple[str, tuple[str, ...], str]] = [
    ("demo", (), CPU),
    ("demo", ("nvidia-smi",), ALL),
    ("demo", (".venv/.installed",), ALL),
    ("demo", (".venv/.installed", ".venv/.for-demo"), NOTHING),
    *((target, (), ALL) for target in ("install", "test", "check", "site")),
    *((f"{target} CPU_ONLY=1", (), CPU) for target in ("install", "test", "check", "site")),
    ("test", (".venv/.for-demo",), ALL),
]
"""Words for make, what is there already, and what would be installed."""


@pytest.mark.parametrize(("words", "there", "brought"), CASES)
def test_what_is_installed(checkout: Path, words: str, there: tuple[str, ...], brought: str) -> None:
    for name in there:
        if name == "nvidia-smi":
            program(checkout, name)
        else:
            (checkout / name).parent.mkdir(exist_ok=True)
            (checkout / name).touch()
    line = sync(checkout, *words.split())
    left_out = [name for name in LEFT_OUT if f"--no-install-package {name}" in line]
    assert (bool(line), left_out) == (brought != NOTHING, LEFT_OUT if brought == CPU else [])
    assert ("--no-default-groups" in line) == (words == "demo" and ".venv/.installed" not in there)


def test_a_bound_that_rises_names_what_goes(tmp_path: Path) -> None:
    script = load_script("budgets")

    def committed(total: int, folder: int, message: str) -> list[str]:
        (tmp_path / "budgets.toml").write_text(f"[total]\nproduct = {total}\n[lines]\nsdk = {folder}\n")
        for words in (["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", message]):
            subprocess.run(["git", *words], cwd=tmp_path, check=True)
        return [line.partition(" raises ")[2] or line.partition(".")[0] for line in script.over(tmp_path)]

    (tmp_path / "sdk").mkdir()
    (tmp_path / "sdk" / "a.py").write_text("a\n" * 7)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert committed(8, 9, "first") == []
    assert committed(6, 9, "falls") == ["product: 7 lines, budget 6"]
    assert committed(8, 9, "rises") == ["total product by 2, and names 0 removed lines."]
    assert committed(8, 12, "moves\n\nRemoves: sdk/b.py (2)") == [
        "lines sdk by 3, and names 2 removed lines.",
        "total product by 2, and names 0 removed lines.",
    ]
    last = committed(9, 14, "moves\n\nRemoves: sdk/b.py (2)\nRemoves: sdk/c.py (1)")
    assert last[0].startswith("lines sdk by 3")


def test_lines_and_records_beyond_their_budget_are_named(tmp_path: Path) -> None:
    for name, text in (("grown", "a\n" * 1300), ("small", "a\n"), ("fresh", "")):
        (tmp_path / "whiflash_sglang" / name).mkdir(parents=True)
        (tmp_path / "whiflash_sglang" / name / "__init__.py").write_text(text)
    script = load_script("budgets")
    known = len(script.records())
    budgets = (
        '[lines]\n"whiflash_sglang/grown" = 1200\n"whiflash_sglang/small" = 1\ngone = 5\n[records]\nserver = '
    )
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
