"""Compilation for a CPU, with a compiler and without one, or with a library that others left."""

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


def test_several_processes_compile_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from whiflash_kernels.cpu.paged_attention import compiled_attention\n"
        "compiled_attention(Path(sys.argv[1]))\n"
        "print(5e-324 * 1.0 > 0, sum('gomp' in line and 'r-xp' in line for line in open('/proc/self/maps')))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
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


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source that takes no time to compile."""
    (tmp_path / "answer.cpp").write_text('extern "C" int answer() { return 42; }')
    return tmp_path / "answer.cpp"


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"no C\+\+ compiler"):
        compiler.load(source, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo 'error: this processor is not known' >&2; exit 1", r"refuses answer.cpp: .*not known"),
        ("exec sleep 60", r"did not end with answer.cpp"),
    ],
)
def test_a_compiler_that_refuses_or_hangs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path, does: str, said: str
) -> None:
    wrong = tmp_path / "c++"
    wrong.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{does}\n')
    wrong.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if "sleep" in does:
        monkeypatch.setattr(compiler, "_PATIENCE", 0.2)
    with pytest.raises(OSError, match=said):
        compiler.load(source, tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


@needs_compiler
def test_a_library_that_is_damaged_or_does_not_load_here_is_made_anew(tmp_path: Path, source: Path) -> None:
    """As of a failing machine; as of a newer system that shares the directory, whole but for other libraries."""
    compiler.load(source, tmp_path / "whole")
    whole, foreign = only(tmp_path / "whole"), b"not a library"
    content = whole.read_bytes()
    foreign += hashlib.sha256(foreign).digest()
    for index, left in enumerate((b"", content[:1000], content[:-1] + b"?", foreign)):
        damaged = tmp_path / str(index) / whole.name
        damaged.parent.mkdir()
        damaged.write_bytes(left)
        assert compiler.load(source, damaged.parent).answer() == 42
        assert damaged.stat().st_size == len(content)


def planted(folder: Path, source: Path) -> Path:
    """A library under the source's name in `folder`, whose loading writes the file that is returned."""
    own = folder.with_name("own")
    compiler.load(source, own)
    trace, program = own.with_name("loaded"), own.with_name("planted.c")
    program.write_text(
        f'#include <stdio.h>\n__attribute__((constructor)) void here(void) {{ fclose(fopen("{trace}", "w")); }}\n'
    )
    folder.mkdir()
    library = folder / only(own).name
    subprocess.run(["cc", "-shared", "-fPIC", program, "-o", library], check=True)
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    return trace


@needs_compiler
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, source: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    trace = planted(folder, source)
    folder.chmod(mode)
    with pytest.raises(OSError, match="another user could put a library there"):
        compiler.load(source, folder)
    assert not trace.exists()


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["directory", "library"])
def test_what_another_user_owns_is_not_loaded(tmp_path: Path, source: Path, what: str) -> None:
    folder = tmp_path / "shared"
    trace = planted(folder, source)
    folder.chmod(0o700)
    library = only(folder)
    os.chown(folder if what == "directory" else library, 65534, 65534)
    if what == "directory":
        with pytest.raises(OSError, match="belongs to user 65534"):
            compiler.load(source, folder)
    else:  # its directory is ours, so it is compiled again
        assert compiler.load(source, folder).answer() == 42
        assert library.stat().st_uid == os.geteuid()
    assert not trace.exists()


@needs_compiler
def test_a_directory_that_is_exchanged_after_its_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path
) -> None:
    """As by another user who may rename it: the library comes from the directory that was checked."""
    trace = planted(tmp_path / "shared", source)
    folder, private = tmp_path / "cache", compiler._is_private

    def exchanged(found: os.stat_result) -> bool:
        if folder.exists():
            folder.rename(tmp_path / "before")
            (tmp_path / "shared").rename(folder)
        return private(found)

    monkeypatch.setattr(compiler, "_is_private", exchanged)
    assert compiler.load(source, folder).answer() == 42
    assert not trace.exists()
    assert only(tmp_path / "before")


@needs_compiler
def test_a_new_compiler_compiles_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path) -> None:
    real, newer = shutil.which("c++"), tmp_path / "c++"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for version in ("13.1", "13.2"):
        newer.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\nexec {real} "$@"\n')
        newer.chmod(0o755)
        compiler.load(source, tmp_path / "made")
    monkeypatch.setattr(compiler, "instructions", lambda: "another machine's")
    compiler.load(source, tmp_path / "made")
    assert len(list((tmp_path / "made").iterdir())) == 3


@needs_compiler
def test_a_kernel_that_computes_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = module._SOURCE.read_text()
    other = tmp_path / "paged_attention.cpp"
    for header in module._SOURCE.parent.glob("*.h"):
        (tmp_path / header.name).write_bytes(header.read_bytes())
    assert "position + 1 :" in source
    other.write_text(source.replace("position + 1 :", "position + 2 :"))
    monkeypatch.setattr(module, "_SOURCE", other)
    with pytest.raises(OSError, match="compute something else"):
        compiled_attention(tmp_path / "compiled")


@pytest.mark.parametrize(
    ("kernels", "avx2", "said"),
    [
        ("torch", True, None),
        ("auto", False, "attention without compiled kernels: this processor has no AVX2, which they are for"),
        ("auto", True, "there is no C++ compiler (c++, g++ or clang++) on the PATH"),
    ],
)
def test_torch_runs_where_a_kernel_cannot_be_had(
    kernels: str,
    avx2: bool,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("WHIFLASH_KERNELS", kernels)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiler, "has_avx2", lambda: avx2)
    assert compiler.available("attention", compiled_attention, tmp_path) is None
    assert [record.getMessage().endswith(said or "") for record in caplog.records] == [True] * bool(said)
    assert list(tmp_path.iterdir()) == []
