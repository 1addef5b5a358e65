"""The real scheduler, worker and KV pools in this process, stepped by hand.

A server's processes take half a minute to import; white-box tests of the tree, the pools and the worker need
neither HTTP nor tokenising. Requests go in as token ids; what comes out is the scheduler's own record of them.
One engine at a time: SGLang's runtime context is process-wide.
"""

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


class Engine:
    """A scheduler with its worker. `run()` steps until every request has ended."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.requests: dict[str, Any] = {}

    @property
    def worker(self) -> Any:
        """Our worker, or the target's where nothing speculates."""
        return self.scheduler.draft_worker or self.scheduler.tp_worker

    def submit(self, rid: str, tokens: Sequence[int], **params: Any) -> None:
        """Queue a request. `params` are SGLang's sampling parameters, and `grammar` for a JSON schema."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        logprobs = params.pop("return_logprob", False)
        sampling = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 32, "ignore_eos": True, **params})
        sampling.normalize(None)
        self.scheduler.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=rid,
                input_text=None,
                input_ids=array("q", tokens),
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=sampling,
                return_logprob=logprobs,
                logprob_start_len=-1,
                top_logprobs_num=2 if logprobs else 0,
                token_ids_logprob=None,
                stream=False,
            )
        )
        for req in self.scheduler.waiting_queue:
            self.requests.setdefault(req.rid, req)

    def step(self) -> bool:
        """One pass of the scheduler's normal event loop; False when there was nothing to run."""
        scheduler = self.scheduler
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch:
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        scheduler.last_batch = batch
        return bool(batch)

    def abort(self, rid: str) -> None:
        from sglang.srt.managers.io_struct import AbortReq

        self.scheduler.abort_request(AbortReq(rid=rid))

    def run(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Step until nothing runs or waits."""
        for _ in range(100_000):
            if not self.step() and not self.scheduler.waiting_queue:
                return
            on_step()
        raise AssertionError("the scheduler never became idle")

    def output(self, rid: str) -> list[int]:
        """Tokens a client would see."""
        req = self.requests[rid]
        return list(req.output_ids_through_stop)

    def generate(self, prompts: Sequence[Sequence[int]], **params: Any) -> list[list[int]]:
        """All prompts at once; their outputs in order."""
        names = [f"g{len(self.requests)}-{i}" for i in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self.submit(name, prompt, **params)
        self.run()
        return [self.output(name) for name in names]

    def check_leaks(self) -> None:
        """SGLang's own check that every slot is free or in the tree; raises when one is lost."""
        self.scheduler.invariant_checker.self_check_during_idle()


@contextlib.contextmanager
def engine(model: Path, *, whiflash: dict[str, Any] | None = None, **arguments: Any) -> Iterator[Engine]:
    """Start an engine in this process.

    Args:
        whiflash: draft path (`draft`) and flags as to `Engine(...)`, e.g. `{"draft": D, "whiflash_router": "ar"}`.
        arguments: SGLang's server arguments.
    """
    from sglang.srt.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )
    from sglang.srt.entrypoints.engine import Engine as SglangEngine
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs

    load_plugins()
    options: dict[str, Any] = {
        "model_path": str(model),
        "dtype": "float32",
        "device": "cpu",
        "skip_tokenizer_init": True,
        "max_total_tokens": 4096,
        "max_running_requests": 8,
        "log_level": "error",
        **arguments,
    }
    if whiflash is not None:
        flags = dict(whiflash)
        options |= {"speculative_algorithm": "WHIFLASH", "speculative_draft_model_path": str(flags.pop("draft"))}
        options |= flags
    server_args = SglangEngine.server_args_class(**options)
    server_args.resolve_once()
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
    os.environ.setdefault("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE", "1")
    scheduler = Scheduler(server_args, PortArgs.init_new(server_args))
    scheduler.output_streamer.send_to_detokenizer = _Discard()
    try:
        with torch.inference_mode():
            yield Engine(scheduler)
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


class _Discard:
    """Where the scheduler's outputs go: the tests read its requests instead."""

    def send_output(self, *_: Any, **__: Any) -> None:
        return
