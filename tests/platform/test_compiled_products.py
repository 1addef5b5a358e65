"""Where products of bfloat16 are compiled: on processors with AVX2 for which oneDNN has none."""

from pathlib import Path
from typing import Any

import pytest

from whiflash_sglang.embedded import cache_root
from whiflash_sglang.platform import packed_weights


@pytest.mark.parametrize(
    ("kernels", "bfloat16", "avx2", "compiled"),
    [
        (None, False, True, True),
        (None, True, True, False),
        (None, False, False, False),
        ("torch", False, True, False),
    ],
)
def test_products_are_compiled_where_nothing_else_is_fast(
    kernels: str | None,
    bfloat16: bool,
    avx2: bool,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[Any] = []
    monkeypatch.setattr(packed_weights, "use", used.append)
    monkeypatch.setattr(packed_weights, "compiled_products", lambda directory: directory)
    monkeypatch.setattr(packed_weights, "onednn_has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(packed_weights, "has_avx2", lambda: avx2)
    monkeypatch.delenv("WHIFLASH_KERNELS", raising=False)
    if kernels is not None:
        monkeypatch.setenv("WHIFLASH_KERNELS", kernels)
    packed_weights.use_compiled_products()
    assert used == ([cache_root() / "compiled"] if compiled else [])


def test_without_a_compiler_torch_multiplies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_weights, "onednn_has_bfloat16", lambda: False)
    monkeypatch.setattr(packed_weights, "has_avx2", lambda: True)
    monkeypatch.delenv("WHIFLASH_KERNELS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WHIFLASH_CACHE", str(tmp_path))
    packed_weights.use_compiled_products()
    (record,) = caplog.records
    assert record.getMessage().endswith("there is no C++ compiler (c++, g++ or clang++) on the PATH")
