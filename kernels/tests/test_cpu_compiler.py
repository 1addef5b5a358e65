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
    hanging.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nexec sleep 60\n')
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


def planted(folder: Path, tmp_path: Path) -> Path:
    """A library under the kernel's name in `folder`, whose loading writes the file that is returned."""
    compiler.load(module._SOURCE, tmp_path / "own", ["-fopenmp"])
    (own,) = (tmp_path / "own").iterdir()
    trace, source = tmp_path / "loaded", tmp_path / "planted.c"
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) void here(void)"
        f' {{ fclose(fopen("{trace}", "w")); }}\n'
    )
    folder.mkdir()
    library = folder / own.name
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    return trace


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path / "shared"
    trace = planted(folder, tmp_path)
    folder.chmod(mode)
    with pytest.raises(OSError, match="another user could put a library there"):
        compiler.load(module._SOURCE, folder, ["-fopenmp"])
    assert not trace.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["directory", "library"])
def test_what_another_user_owns_is_not_loaded(tmp_path: Path, what: str) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path / "shared"
    trace = planted(folder, tmp_path)
    folder.chmod(0o700)
    (library,) = folder.iterdir()
    os.chown(folder if what == "directory" else library, 65534, 65534)
    if what == "directory":
        with pytest.raises(OSError, match="belongs to user 65534"):
            compiler.load(module._SOURCE, folder, ["-fopenmp"])
    else:  # its directory is ours, so it is compiled again
        assert compiler.load(module._SOURCE, folder, ["-fopenmp"]).whiflash_threads
        assert library.stat().st_uid == os.geteuid()
    assert not trace.exists()


def test_a_directory_that_is_exchanged_after_its_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As by another user who may rename it: the library comes from the directory that was checked."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    trace = planted(tmp_path / "shared", tmp_path)
    folder, private = tmp_path / "cache", compiler._is_private

    def exchanged(found: os.stat_result) -> bool:
        if folder.exists():
            folder.rename(tmp_path / "before")
            (tmp_path / "shared").rename(folder)
        return private(found)

    monkeypatch.setattr(compiler, "_is_private", exchanged)
    assert compiler.load(module._SOURCE, folder, ["-fopenmp"]).whiflash_threads
    assert not trace.exists()
    assert len(list((tmp_path / "before").iterdir())) == 1


def test_a_new_compiler_compiles_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = shutil.which("c++")
    if real is None:
        pytest.skip("no C++ compiler here")
    newer = tmp_path / "c++"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for version in ("13.1", "13.2"):
        newer.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\nexec {real} "$@"\n')
        newer.chmod(0o755)
        compiler.load(module._SOURCE, tmp_path / "made", ["-fopenmp"])
    assert len(list((tmp_path / "made").iterdir())) == 2


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
    assert "position + 1 :" in source
    other.write_text(source.replace("position + 1 :", "position + 2 :"))
    monkeypatch.setattr(module, "_SOURCE", other)
    with pytest.raises(OSError, match="computes something else"):
        compiled_attention(tmp_path / "compiled")
