"""Under overlap scheduling: results that come when the next round runs, and work between two forwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.managers.auxiliary_output import append_auxiliary_output
from sglang.srt.runtime_context import get_schedule

from whiflash_sglang.device.transfers import Download
from whiflash_sglang.engine.forward.sampling import cut_likeliest, keep_rows
from whiflash_sglang.records.core import Results, Verified


def carry(output: Any, results: Download[Results], learn: Callable[..., object]) -> list[list[int]]:
    """Have the results travel with `output`, SGLang's record of the forward, until the scheduler processes it and
    `learn` takes them. Returns what is known of the round's tokens: nothing.
    """
    results.learn = learn
    output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, results)
    return []


@contextmanager
def behind_forward(runner: Any) -> Iterator[None]:
    """Work issued here runs after the forward that is under way, and before the scheduler's next work.

    Its own stream, on which it processes results, is ahead of the forward. Without overlap scheduling there is one.
    """
    if get_schedule().disable_overlap_schedule:
        yield
        return
    device = torch.get_device_module(runner.device)
    scheduling, forward = device.current_stream(), runner.forward_stream
    forward.wait_stream(scheduling)
    with device.stream(forward):
        yield
    # It read the slot table, which the next batch writes to.
    scheduling.wait_stream(forward)


def attach(batch: Any, verified: Verified, stride: int) -> None:
    """Arrange the records of the packed rows as those of the tokens: `stride` columns a request.

    If a request has fewer rows, its last one fills the columns: nobody reads them.
    """
    if not (batch.return_logprob or batch.return_hidden_states):
        return
    output, indptr = verified.output, verified.indptr
    columns = torch.arange(stride, device=indptr.device)
    last = indptr[1:, None].to(torch.int64) - 1
    index = torch.minimum(indptr[:-1, None].to(torch.int64) + columns, last)
    if batch.return_logprob:
        keep_rows(output, index)
        cut_likeliest(output, batch.top_logprobs_nums, stride)
    if batch.return_hidden_states:
        if verified.final_hidden is None:
            raise AssertionError("SGLang admits such requests only where the server keeps hidden states")
        output.hidden_states = verified.final_hidden[index.flatten()]
