"""Under overlap scheduling: results that come when the next round runs, and work between two forwards."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from sglang.srt.managers.auxiliary_output import CommittedTokens, append_auxiliary_output
from sglang.srt.runtime_context import get_schedule

from whiflash_sglang.compat.forward.sampling import cut_likeliest, keep_rows
from whiflash_sglang.core import Verified
from whiflash_sglang.device.transfers import Download


class Learn(Protocol):
    """Takes a round's results and, where the scheduler has kept tokens already, those of each request."""

    def __call__(
        self, found: dict[str, list[Any]], kept: Sequence[Sequence[int]] | None = None, /
    ) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A round's results beside SGLang's own, which the scheduler copies together (`DeviceAuxiliaryOutput`).

    What is packed is a tensor of its own: no later round writes to it, captured or not.
    """

    results: Download
    learn: Learn

    def copy_to_host(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> "OnHost":
        return OnHost(self, copy(self.results.packed))


@dataclass(frozen=True, slots=True)
class OnHost:
    """The same when the copies have come (`HostAuxiliaryOutput`)."""

    sent: OnDevice
    packed: torch.Tensor

    def consume(self, batch: Any, commits: Sequence[CommittedTokens | None]) -> None:
        """Called when the tokens are in the requests, before they are streamed."""
        kept = [() if commit is None else commit.token_ids for commit in commits]
        self.sent.learn(self.sent.results.read(self.packed), kept)


def learned(output: Any, results: Download, learn: Learn, *, later: bool) -> list[list[int]]:
    """`learn` from `results` now, and what it says was committed; or `later`, and nothing is known yet.

    Args:
        output: SGLang's record of the forward, with which the results travel until the scheduler processes it.
    """
    if not later:
        return learn(results.read())
    output.auxiliary_device_output = append_auxiliary_output(
        output.auxiliary_device_output, OnDevice(results, learn)
    )
    return []


@contextmanager
def behind_forward(runner: Any) -> Iterator[None]:
    """What is issued here runs behind the forward that is under way, and before what the scheduler issues next.

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

    Where a request has fewer rows its last one fills the columns: nobody reads them.
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
