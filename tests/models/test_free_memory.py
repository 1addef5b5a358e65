"""Packed copies go by the memory of the container that they are made in."""

from pathlib import Path

import psutil
import pytest
import torch
from whiflash_kernels.packed import is_packed, packable

from whiflash_sglang.formats import packed

MIB = 2**20


def container(path: Path, limit: str) -> Path:
    """The files of a container that has taken 500 MiB, 100 of them pages of files that it has read."""
    stat = f"anon {400 * MIB}\ninactive_file {100 * MIB}\nactive_file 7\n"
    for name, text in {"max": limit, "current": f"{500 * MIB}\n", "stat": stat}.items():
        (path / f"memory.{name}").write_text(text)
    return path


@pytest.mark.parametrize(("limit", "free"), [(600 * MIB, 200 * MIB), (300 * MIB, 0)])
def test_a_container_with_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, free: int) -> None:
    monkeypatch.setattr(packed, "_CONTAINER", container(tmp_path, f"{limit}\n"))
    assert packed.free_memory() == free


@pytest.mark.parametrize("limit", ["max\n", f"{2**60}\n", ""])
def test_no_limit_or_no_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(packed, "_CONTAINER", container(tmp_path, limit) if limit else tmp_path)
    assert packed.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_nothing_is_packed_beyond_the_containers_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    if not packable(weight):
        pytest.skip("oneDNN multiplies no bfloat16 on this processor")
    monkeypatch.setattr(packed, "_CONTAINER", container(tmp_path, f"{400 * MIB}\n"))
    assert packed.pack([weight]) == 0
    assert not is_packed(weight)
