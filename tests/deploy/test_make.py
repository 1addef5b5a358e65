"""What `make` would install: the demo brings what a CPU needs, everything else brings everything."""

import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from loaded_scripts import load_script

ROOT = Path(__file__).parents[2]
LEFT_OUT = (ROOT / "docs" / "cpu-leaves-out.txt").read_text("utf-8").split()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the Makefile asks for, on a machine with uv and without a card."""
    for name in ("Makefile", "docs/cpu-leaves-out.txt", "pyproject.toml", "uv.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("sdk/pyproject.toml", "kernels/pyproject.toml"):
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


def test_the_demo_leaves_out_what_a_cpu_does_not_need(checkout: Path) -> None:
    line = sync(checkout, "demo")
    assert LEFT_OUT
    assert all(f"--no-install-package {name}" in line for name in LEFT_OUT)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_nothing_is_left_out_that_torch_is_linked_with() -> None:
    """Its build for CUDA needs two of CUDA's libraries on a CPU, too; another machine may have them elsewhere."""
    torch = distribution("torch")
    libraries = {file.name: Path(file.locate()) for file in torch.files or () if file.parent.name == "lib"}
    open_, needed = ["libtorch_global_deps.so", "libtorch_python.so"], set[str]()
    while open_:
        for name in linked_with(libraries[open_.pop()]) - needed:
            needed.add(name)
            open_ += [name] if name in libraries else []
    assert "libtorch_cpu.so" in needed
    for package in LEFT_OUT:
        try:
            brought = {file.name for file in distribution(package).files or ()}
        except PackageNotFoundError:
            continue
        assert not brought & needed, f"{package} is left out"


def linked_with(library: Path) -> set[str]:
    """Libraries that the loader must find with this one."""
    told = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", told))


@pytest.mark.parametrize("target", ["install", "test", "check", "site"])
def test_everything_else_brings_everything(checkout: Path, target: str) -> None:
    assert " sync " in sync(checkout, target)
    assert "--no-install-package" not in sync(checkout, target)
    assert "--no-install-package" in sync(checkout, target, "CPU_ONLY=1")


def test_the_demo_takes_nothing_away(checkout: Path) -> None:
    """Neither from a machine with a card, nor from one where everything is installed."""
    program(checkout, "nvidia-smi")
    assert "--no-install-package" not in sync(checkout, "demo")
    (checkout / "bin" / "nvidia-smi").unlink()
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    assert "--no-install-package" not in sync(checkout, "demo")
    (checkout / ".venv" / ".for-demo").touch()
    assert sync(checkout, "demo") == ""


def test_who_saw_the_demo_gets_the_rest_for_the_tests(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".for-demo").touch()
    assert " sync " in sync(checkout, "test")


def test_lines_and_records_beyond_their_budget_are_named(tmp_path: Path) -> None:
    for name, text in (("grown", "a\n" * 1300), ("small", "a\n"), ("fresh", "")):
        (tmp_path / "whiflash_sglang" / name).mkdir(parents=True)
        (tmp_path / "whiflash_sglang" / name / "__init__.py").write_text(text)
    budgets = '[lines]\n"whiflash_sglang/grown" = 1200\n"whiflash_sglang/small" = 1\ngone = 5\n[records]\nserver = 3\n'
    (tmp_path / "budgets.toml").write_text(budgets)
    script = load_script("budgets")
    assert [line.partition(". ")[0] for line in script.over(tmp_path)] == [
        "whiflash_sglang/grown: 1,300 lines, budget 1,200",
        "gone: no Python, budget 5",
        "whiflash_sglang/fresh: no budget",
        f"server: {len(script.records())} record types, budget 3",
    ]
    assert "whiflash_sglang.core:Round" in script.records()
