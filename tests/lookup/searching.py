"""The compiled search, for tests of what uses it."""

import pytest
from whiflash_kernels.cpu.copies import CompiledCopies, compiled_copies

from whiflash_sglang.embedded import cache_root


def _search() -> CompiledCopies:
    try:
        return compiled_copies(cache_root() / "compiled")
    except OSError as error:
        pytest.skip(str(error), allow_module_level=True)


SEARCH = _search()
