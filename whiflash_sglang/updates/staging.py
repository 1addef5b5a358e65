"""New values of parameters, where a swap takes them from: in memory that the device reads, before the swap begins.

On a CPU that is where they were read. On a GPU every parameter that may change has room for its next value, made at the
start: nothing is allocated while serving, and pools are sized without it. Values go there through a pinned buffer, on a
stream of their own, which is ordered with the rounds by events. Imports no SGLang.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PINNED = 32 * 2**20
"""Bytes that are under way to the device at once."""

Staged = Mapping[str, Tensor]
"""Name of a parameter → its next value, at least the rows that change."""


class Staging:
    """Room for the next values of parameters, of one switch at a time.

    Args:
        parameters: arm → name → the rows that may change, as they serve; all on one device.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Tensor]]) -> None:
        device = next((value.device for each in parameters.values() for value in each.values()), None)
        self._device = None if device is None or device.type == "cpu" else torch.get_device_module(device)
        self._room: dict[str, dict[str, Tensor]] = {}
        if self._device is None:
            return
        self._room = {
            arm: {key: torch.empty_like(value) for key, value in each.items()}
            for arm, each in parameters.items()
        }
        self._pinned = torch.empty(PINNED, dtype=torch.uint8, pin_memory=True)
        self._stream = self._device.Stream()
        self._read = self._device.Event()
        self._read.record()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run the thread that reads a version: its work on the device goes beside the rounds, after the last swap."""
        if self._device is None:
            yield
            return
        with self._device.stream(self._stream):
            self._stream.wait_event(self._read)
            yield

    def stage(self, arm: str, values: Mapping[str, Tensor]) -> Staged:
        """Values of the host, put where a swap takes them from. `beside` only; the thread waits for the device."""
        if self._device is None:
            return values
        for key, room in self._room[arm].items():
            self._send(values[key][: len(room)], room)
        return self._room[arm]

    def _send(self, value: Tensor, room: Tensor) -> None:
        module: Any = self._device
        source, to, sent = value.reshape(-1), room.view(-1), module.Event()
        size = PINNED // value.element_size()
        pinned = self._pinned.view(value.dtype)
        for begin in range(0, len(source), size):
            part = source[begin : begin + size]
            buffer = pinned[: len(part)]
            buffer.copy_(part)
            to[begin : begin + len(part)].copy_(buffer, non_blocking=True)
            sent.record()
            sent.synchronize()

    @contextmanager
    def read(self) -> Iterator[None]:
        """Have the swap, on the current stream, come before the next staging. The staged numbers are there, since the
        thread waited for them.
        """
        yield
        if self._device is not None:
            self._read.record()
