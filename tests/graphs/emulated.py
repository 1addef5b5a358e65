"""SGLang's graph runner, ours by inheritance, on a CPU: it captures tapes and replays them."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from captured_attention import CapturedAttention
from engine import Engine
from op_tape import Tape, TapeRecorder, recording
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import decode_cuda_graph_runner as dcgr
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend

from whiflash_sglang.arms.paged import PagedArm
from whiflash_sglang.engine.forward.graphs import VerifyGraphs
from whiflash_sglang.engine.scheduler.spec_worker import max_running_requests


class TapeBackend(BaseCudaGraphBackend):
    """One tape a shape. `replayed`: the shapes of all replays, in order."""

    def __init__(self, runner: Any = None) -> None:
        self.tapes: dict[Any, Tape] = {}
        self.outputs: dict[Any, Any] = {}
        self.replayed: list[int] = []

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self, shape_key: Any, forward_fn: Any, capture_inputs: Any = None, post_warmup_hook: Any = None
    ) -> None:
        forward_fn()
        if post_warmup_hook is not None:
            post_warmup_hook()
        with recording() as tape:
            self.outputs[shape_key] = forward_fn()
        self.tapes[shape_key] = tape

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self.tapes

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        self.tapes[shape_key].replay()
        self.replayed.append(shape_key.size)
        return self.outputs[shape_key]

    def cleanup(self) -> None:
        self.tapes.clear()


@contextmanager
def emulated_graphs(engine: Engine, attention: Callable[[Any], Any] = CapturedAttention) -> Iterator[VerifyGraphs]:
    """Capture the engine's verifications and its drafters' passes, and let its rounds replay them.

    The graphs have `passes` too, which counts the replays of drafters' passes, and `committed`: of every replay of a
    verification whether its end has committed.
    """

    @contextmanager
    def no_stream(stream: Any = None) -> Iterator[Any]:
        yield SimpleNamespace(stream=None)

    runner = engine.scheduler.tp_worker.model_runner
    outputs = GraphSharedOutput(device=torch.device("cpu"), max_rows=runner.max_shared_logits_buffer_rows())
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (dcgr, "graph_capture", no_stream),
            (dcgr, "get_or_create_global_graph_capture_stream", lambda: None),
            (dcgr, "resolve_decode_backend", TapeBackend),
            (ForwardMode, "is_cpu_graph", ForwardMode.is_cuda_graph),
            (runner, "graph_shared_output", outputs),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        stack.enter_context(patch.object(torch.cpu, "is_current_stream_capturing", lambda: False, create=True))
        graphs = runner._decode_cuda_graph_runner_cls()(runner, attn_backend=attention(runner))
        stack.enter_context(patch.object(runner, "decode_cuda_graph_runner", graphs))
        graphs.committed = stack.enter_context(captured_ends(engine.worker.stages.ends))
        graphs.passes = stack.enter_context(captured_passes(engine.worker))
        yield graphs


@contextmanager
def captured_ends(ends: Any) -> Iterator[list[bool]]:
    """List for every round whether a graph has committed it; captured graphs are forgotten at the end."""
    committed: list[bool] = []
    epilogue = ends._epilogue
    slots, vocabulary = len(epilogue.penalties.few.places), epilogue.penalties.few.bias.shape[1]
    epilogue.penalties.__init__(slots, vocabulary, slots, "cpu")  # as on a card
    ends.capture_seconds(TapeRecorder())
    commit = epilogue.commit

    def watched(rows: Any, stride: int) -> Any:
        if rows.forward is not None:  # else a graph is being captured
            committed.append(rows.committed is not None)
        return commit(rows, stride)

    with patch.object(epilogue, "commit", watched):
        yield committed
    ends.let_commit(False)
    ends._graphs.clear()
    ends._seconds.clear()


@contextmanager
def captured_passes(worker: Any) -> Iterator[TapeRecorder]:
    """Capture the passes of a worker's drafters, for its largest batch."""
    recorder = TapeRecorder()
    worker.stages.drafting.capture(recorder, max_running_requests())
    try:
        yield recorder
    finally:
        worker.sync._captured.clear()
        for drafter in worker.drafters.values():
            if isinstance(drafter, PagedArm):
                drafter._captured = None
