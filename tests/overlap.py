"""The scheduler's own overlap loop (`overlap_loop`), on streams that keep to no order of their own.

SGLang runs its overlapped loop on GPUs. Here it runs as it is, on the CPU, as it would on CUDA: with CUDA's barrier
between a forward's reads and the next batch's writes, its private stream for lengths and its copies of results.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine import engine
from overlap_loop import OverlapLoop
from streams import HOST, PINNED, Streams
from watching import noting_births, watching


class OverlappedEngine(OverlapLoop):
    """The loop under a model of streams."""

    def __init__(self, scheduler: Any, streams: Streams) -> None:
        super().__init__(scheduler)
        self.streams = streams
        names = {"schedule": scheduler.schedule_stream, "forward": scheduler.forward_stream}
        for name, stream in (names | {"copy": scheduler.copy_stream}).items():
            stream.name = name
        # SGLang makes these on CUDA only.
        future = scheduler.future_map
        future.fwd_prepare_d2h_stream = torch.cpu.Stream()
        future.fwd_prepare_d2h_stream.name = "lengths"
        future.new_seq_lens_cpu_pinned = torch.empty_like(future.new_seq_lens_buf)
        streams.made_by_host(future.new_seq_lens_cpu_pinned, PINNED)
        streams.made_by_host(scheduler.req_to_token_pool.req_generation, HOST)

    def watched(self) -> contextlib.AbstractContextManager[None]:
        return watching(self.streams)


def publishing(verify: Callable[..., Any]) -> Callable[..., Any]:
    """`Target.verify`, captured: the next batch may write to the slot table when it has read it, as early as it can."""

    def published(target: Any, *args: Any) -> Any:
        verified = verify(target, *args)
        target.runner.shared_read_done_event = torch.cpu.Event()
        target.runner.shared_read_done_event.record()
        return verified

    return published


@contextlib.contextmanager
def overlapped(model: Path, *, host_lengths: bool = True, **arguments: Any) -> Iterator[OverlappedEngine]:
    """Start an engine with overlap scheduling.

    Args:
        host_lengths: whether the attention backend asks for lengths on the host, as TRT-LLM's does; FA3 and Triton
            do not, and `batch.seq_lens_cpu` is None there.
        arguments: as of `engine`.
    """
    from sglang.srt.arg_groups import speculative_hook

    from whiflash_cpu.attention import CpuAttentionBackend, CpuMultiStepDraftBackend
    from whiflash_cpu.cpu import CpuPlatform
    from whiflash_cpu.seams import install_early_seams, install_seams

    install_early_seams()
    install_seams()  # before the model of streams is: both have a `record_stream`
    from sglang.srt.speculative import eagle_worker_common, spec_utils

    defaults = CpuPlatform.apply_server_args_defaults
    streams = Streams()

    def with_overlap(self: CpuPlatform, server_args: Any) -> None:
        defaults(self, server_args)
        server_args.disable_overlap_schedule = False

    def record_stream_each(tensors: Iterable[Any], stream: Any) -> None:
        """SGLang's leaves tensors of a CPU out."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(stream)

    with (
        patch.object(spec_utils, "record_stream_each", record_stream_each),
        patch.object(eagle_worker_common, "record_stream_each", record_stream_each),
        patch.object(CpuPlatform, "apply_server_args_defaults", with_overlap),
        patch.object(speculative_hook, "_disable_overlap_schedule_for_cpu", lambda _: None),
        patch.object(CpuAttentionBackend, "needs_cpu_seq_lens", host_lengths, create=True),
        patch.object(CpuMultiStepDraftBackend, "needs_cpu_seq_lens", host_lengths, create=True),
        streams.installed(),
        contextlib.ExitStack() as running,
    ):
        with noting_births(streams):
            started = running.enter_context(engine(model, **arguments))
        assert started.scheduler.enable_overlap
        yield OverlappedEngine(started.scheduler, streams)
