"""JSON of others: what is too deep for a recursive function is refused as what is no JSON is."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

reading: Any = importlib.import_module("whiflash_sdk.reading")
read_json: Callable[..., Any] = reading.read_json
DEEPEST: int = reading.DEEPEST


@pytest.mark.parametrize("depth", [DEEPEST + 1, 480, 3_000, 100_000])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}"), ('[[1],{"a":', "}]")])
def test_what_nests_too_deep_is_no_json(depth: int, opens: str, closes: str) -> None:
    """Also text that never closes, and where the interpreter itself would read it."""
    levels = depth if len(opens) < 9 else depth // 2 + 1
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + 4_000)
    try:
        for text in (opens * levels + "1" + closes * levels, opens * levels):
            for given in (text, text.encode()):
                with pytest.raises(ValueError, match=r"nests deeper|Expecting value"):
                    read_json(given)
    finally:
        sys.setrecursionlimit(limit)


def test_the_rest_is_read() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert str(read_json(text)) == text
    wide = '{"a": "' + "[{" * 1_000 + '", "b": [[], {}, 1e3]}'
    assert read_json(wide) == {"a": "[{" * 1_000, "b": [[], {}, 1000.0]}
    assert read_json('"' + "[" * 1_000 + '"') == "[" * 1_000
    for broken in ("", "[", b"\xff", "9" * 5_000):
        with pytest.raises(ValueError):  # noqa: PT011 (each has words of its own)
            read_json(broken)
