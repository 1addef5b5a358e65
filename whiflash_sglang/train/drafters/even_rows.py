"""Products of few different sizes: on a CPU each new size is compiled anew, which took a sixth of the training."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROWS = 64
"""A batch's rows are filled up to a multiple of this, so that a training meets a few dozen sizes, not thousands."""


class EvenRows(TorchFunctionMode):
    """Inside, `torch.nn.functional.linear` fills a CPU tensor [..., H] up with rows of zeros that its result lacks."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.linear or not args or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        given: Tensor = args[0]
        flat = given.reshape(-1, given.shape[-1])
        rows = len(flat)
        filled = F.pad(flat, (0, 0, 0, -rows % ROWS))
        product: Tensor = F.linear(filled, *args[1:], **(kwargs or {}))
        return product[:rows].view(*given.shape[:-1], product.shape[-1])
