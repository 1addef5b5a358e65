"""Products of bfloat16 are compiled on processors with AVX2 for which oneDNN has none."""

from typing import Any

import pytest
from whiflash_kernels.cpu import compiler

from whiflash_cpu import packed_weights
from whiflash_sglang.embedded import cache_root


@pytest.mark.parametrize(
    ("bfloat16", "avx2", "compiled"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_products_are_compiled_where_nothing_else_is_fast(
    bfloat16: bool, avx2: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    monkeypatch.setattr(packed_weights, "use", used.append)
    monkeypatch.setattr(packed_weights, "compiled_products", lambda directory: directory)
    monkeypatch.setattr(packed_weights, "onednn_has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(compiler, "has_avx2", lambda: avx2)
    monkeypatch.delenv("WHIFLASH_KERNELS", raising=False)
    packed_weights.use_compiled_products()
    assert [kernel for kernel in used if kernel] == ([cache_root() / "compiled"] if compiled else [])
