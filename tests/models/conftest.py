"""Modules that a drafter is loaded into hold NaN before: a parameter that nobody fills is seen."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from whiflash_sglang.formats.checkpoint import Unfilled


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    make = Unfilled.__torch_function__

    def made(self: Unfilled, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = make(self, func, types, args, kwargs)
        return value.fill_(float("nan")) if func is torch.empty else value

    with patch.object(Unfilled, "__torch_function__", made):
        yield
