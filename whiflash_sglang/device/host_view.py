"""What the host may know of values on the device while it plans. Imports no SGLang."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class HostView:
    """Whether the host may read the device's values at any time.

    exact: reading costs nothing (a CPU), so everything has the size that it needs. Where it is not, reading would wait
    for the device: sizes are bounds that the host knows, and what runs is padded to them.
    """

    exact: bool

    @classmethod
    def of(cls, device: torch.device) -> "HostView":
        """As `device` allows. `WHIFLASH_DEVICE_RESIDENT=1` treats a CPU as if it were one that must not be read."""
        resident = os.environ.get("WHIFLASH_DEVICE_RESIDENT") == "1"
        return cls(device.type == "cpu" and not resident)


EXACT = HostView(exact=True)
