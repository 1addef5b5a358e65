"""Handle overlap scheduling: results that arrive while the next round runs, and work between two forwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.managers.auxiliary_output import append_auxiliary_output
from sglang.srt.runtime_context import get_schedule

from whiflash_sglang.device.transfers import Download
from whiflash_sglang.records.core import Results, Verified


def carry(output: Any, results: Download[Results], learn: Callable[..., object]) -> None:
    """Attach the results to `output`, SGLang's record of the forward, until the scheduler processes it and `learn`
    takes them.
    """
    results.learn = learn
    output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, results)


def is_on() -> bool:
    """Whether rounds overlap, as SGLang resolved it: its arguments may still say yes where it turned overlap off."""
    return not get_schedule().disable_overlap_schedule


@contextmanager
def behind_forward(runner: Any) -> Iterator[None]:
    """Run the device work of the `with` block after the current forward and before the scheduler's next work.

    The scheduler processes results on a stream that is ahead of the forward's. Without overlap both are one stream.
    """
    if not is_on():
        yield
        return
    device = torch.get_device_module(runner.device)
    scheduling, forward = device.current_stream(), runner.forward_stream
    forward.wait_stream(scheduling)
    with device.stream(forward):
        yield
    # The work reads the slot table, which the next batch writes to.
    scheduling.wait_stream(forward)


def attach(batch: Any, verified: Verified, stride: int) -> None:
    """Arrange the packed rows' hidden states as SGLang expects its tokens: in `stride` columns for each request.

    If a request has fewer rows, other rows fill its columns, which nobody reads.
    """
    if not batch.return_hidden_states:
        return
    if (states := verified.final_hidden) is None:
        raise AssertionError("SGLang admits such requests only where the server keeps hidden states")
    index = (verified.indptr[:-1, None] + torch.arange(stride, device=states.device)).clamp_(max=len(states) - 1)
    verified.output.hidden_states = states[index.flatten()]
