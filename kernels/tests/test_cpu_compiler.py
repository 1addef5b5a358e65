"""What is compiled for a CPU, where there is a compiler and where there is none, or a library that others left."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from whiflash_kernels.cpu import compiler
from whiflash_kernels.cpu import paged_attention as module
from whiflash_kernels.cpu.paged_attention import compiled_attention

KERNELS = Path(__file__).parents[1]


def test_several_processes_compile_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from whiflash_kernels.cpu.paged_attention import compiled_attention\n"
        "compiled_attention(Path(sys.argv[1]))\n"
        "print(5e-324 * 1.0 > 0, sum('gomp' in line and 'r-xp' in line for line in open('/proc/self/maps')))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(KERNELS)}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        said, error = process.communicate()
        if "no C++ compiler" in error:
            pytest.skip("no C++ compiler here")
        assert said == "True 1\n", error  # Subnormal numbers stay, and torch's OpenMP is the only one.
    assert [x.suffix for x in tmp_path.iterdir()] == [".so"]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no C\+\+ compiler"):
        compiled_attention(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_compiler_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = tmp_path / "c++"
    refusing.write_text("#!/bin/sh\necho 'error: this processor is not known' >&2; exit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(OSError, match=r"refuses paged_attention.cpp: .*not known"):
        compiled_attention(tmp_path / "refused")
    assert list((tmp_path / "refused").iterdir()) == []


def test_a_compiler_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging = tmp_path / "c++"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(compiler, "_PATIENCE", 0.2)
    with pytest.raises(OSError, match=r"did not end with paged_attention.cpp"):
        compiled_attention(tmp_path / "hung")
    assert list((tmp_path / "hung").iterdir()) == []


def test_a_library_that_does_not_load_here_is_made_anew(tmp_path: Path) -> None:
    """As of a newer system that shares the directory: whole, but for other libraries than this process has."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    compiler.load(module._SOURCE, tmp_path / "own", ["-fopenmp"])
    (own,) = (tmp_path / "own").iterdir()
    content = b"not a library"
    foreign = tmp_path / "foreign" / own.name
    foreign.parent.mkdir()
    foreign.write_bytes(content + hashlib.sha256(content).digest())
    compiled_attention(foreign.parent)
    assert foreign.stat().st_size == own.stat().st_size


def test_a_library_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    compiler.load(module._SOURCE, tmp_path / "whole", ["-fopenmp"])
    (whole,) = (tmp_path / "whole").iterdir()
    content = whole.read_bytes()
    for index, left in enumerate((b"", content[:1000], content[:-1] + b"?")):
        damaged = tmp_path / str(index) / whole.name
        damaged.parent.mkdir()
        damaged.write_bytes(left)
        compiled_attention(damaged.parent)
        assert damaged.stat().st_size == len(content)


def test_a_kernel_that_computes_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    source = module._SOURCE.read_text()
    other = tmp_path / "paged_attention.cpp"
    for header in module._SOURCE.parent.glob("*.h"):
        (tmp_path / header.name).write_bytes(header.read_bytes())
    assert "position + 1}" in source
    other.write_text(source.replace("position + 1}", "position + 2}"))
    monkeypatch.setattr(module, "_SOURCE", other)
    with pytest.raises(OSError, match="computes something else"):
        compiled_attention(tmp_path / "compiled")
