"""Parameters of which `make test` runs a sample, and `make evidence` the rest."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], *sample: Any) -> list[Any]:
    """`values` for `pytest.mark.parametrize`, of which those in `sample` run in every `make test`."""
    rows = list(values)
    assert all(value in rows for value in sample), f"of {sample} not all are among {rows}"
    return [value if value in sample else _left_out(value) for value in rows]


def chosen(config: pytest.Config, values: tuple[Any, ...], *sample: Any) -> tuple[Any, ...]:
    """The same of what one test asks in turn."""
    return values if config.getoption("--evidence") else sample


def _left_out(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.evidence)
