"""The real scheduler, worker and KV pools in this process, stepped by hand.

A server's processes take half a minute to import; white-box tests of the tree, the pools and the worker need neither
HTTP nor tokenising. Requests go in as token ids; the scheduler's own record of them comes out. One engine at a time:
SGLang's runtime context is process-wide. An engine's threads, sockets, weights and KV pools go with it.
"""

import contextlib
import gc
import itertools
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import zmq

REQUEST_FIELDS = (
    *("bootstrap_host", "bootstrap_port", "bootstrap_room", "cache_salt", "custom_logit_processor", "extra_key"),
    *("images", "logprob_start_len", "lora_id", "priority", "require_reasoning", "return_hidden_states"),
    *("return_logprob", "return_routed_experts", "session", "session_id", "token_ids_logprob"),
    *("token_indices_to_pool", "top_logprobs_num"),
)
"""Arguments of `Engine.submit` beside sampling parameters."""

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


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
        """Queue a request. `params` are SGLang's sampling parameters, and those of `REQUEST_FIELDS`.

        With `return_logprob` the two likeliest tokens come too, unless `top_logprobs_num` says otherwise.
        `session`: the id of an open session, or SGLang's fields of one (`id`, and `rid` of the turn before). Grammars
        and stop strings need a tokenizer: start the engine with `skip_tokenizer_init=False`. `images`: makes what
        SGLang's processor makes of them, which a request uses up.
        An abort names its request by prefix, so no `rid` may begin with another.
        """
        from sglang.srt.managers.io_struct import SessionParams, TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        fields = {name: params.pop(name) for name in REQUEST_FIELDS if name in params}
        session, images = fields.pop("session", None), fields.pop("images", None)
        if session is not None:
            fields["session_params"] = SessionParams(**(session if isinstance(session, dict) else {"id": session}))
        logprobs = fields.setdefault("return_logprob", False)
        sampling = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 32, "ignore_eos": True, **params})
        sampling.normalize(self.scheduler.tokenizer)
        self.scheduler.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=rid,
                input_text=None,
                input_ids=array("q", tokens),
                input_embeds=None,
                mm_inputs=None if images is None else images(),
                token_type_ids=None,
                sampling_params=sampling,
                stream=False,
                **{
                    "logprob_start_len": -1,
                    "top_logprobs_num": 2 if logprobs else 0,
                    "token_ids_logprob": None,
                    **fields,
                },
            )
        )
        ahead = getattr(self.scheduler, "previews", {}).values()
        asked = getattr(self.scheduler.disagg_decode_prealloc_queue, "queue", ())  # of a decode server
        queues = self.scheduler.waiting_queue, self.scheduler.grammar_manager.grammar_queue, ahead
        for req in (*itertools.chain(*queues), *(each.req for each in asked)):
            self.requests.setdefault(req.rid, req)

    def step(self) -> bool:
        """One pass of the scheduler's normal event loop; False when there was nothing to run."""
        scheduler = self.scheduler
        plan = scheduler.get_next_batch_to_run(running_batch=scheduler.running_batch, last_batch=scheduler.last_batch)
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch:
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
        scheduler.last_batch = batch
        return bool(batch)

    @property
    def waiting(self) -> bool:
        """Whether requests are queued that no step has taken yet."""
        return bool(self.scheduler.waiting_queue or self.scheduler.grammar_manager.grammar_queue)

    def abort(self, rid: str) -> None:
        """Abort a request in whatever state it is."""
        from sglang.srt.managers.io_struct import AbortReq

        self.scheduler.abort_request(AbortReq(rid=rid))

    def open_session(self, name: str, *, streaming: bool) -> None:
        """Open a session, which requests name with `session`."""
        from sglang.srt.managers.io_struct import OpenSessionReqInput

        opened = self.scheduler.open_session(
            OpenSessionReqInput(capacity_of_str_len=10_000, session_id=name, streaming=streaming)
        )
        assert opened.success

    def close_session(self, name: str) -> None:
        """Give up everything that the session keeps."""
        from sglang.srt.managers.io_struct import CloseSessionReqInput

        self.scheduler.close_session(CloseSessionReqInput(session_id=name))

    def update_target(self, target: Path) -> None:
        """Give the target other weights, of these files, as a client asks for it."""
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        request = UpdateWeightFromDiskReqInput(model_path=str(target), load_format="auto")
        self.scheduler.process_input_requests([request])

    def start_over(self, router: str) -> None:
        """As after the start, with this policy: nothing is remembered, nothing is cached."""
        self.worker.reconfigure({"router": router})
        self.worker.forget(None)
        self.scheduler.flush_cache()

    def run(self, on_step: Callable[[], object] = int) -> None:
        """Step until nothing runs or waits."""
        for _ in range(100_000):
            if not self.step() and not self.waiting:
                return
            on_step()
        raise AssertionError("the scheduler never became idle")

    def output(self, rid: str) -> list[int]:
        """Tokens a client would see."""
        req = self.requests[rid]
        return list(req.output_ids_through_stop)

    def ask(self, rid: str, tokens: Sequence[int], **params: Any) -> list[int]:
        """`submit` a request and `run`; its output."""
        self.submit(rid, tokens, **params)
        self.run()
        return self.output(rid)

    def generate(
        self, prompts: Sequence[Sequence[int]], on_step: Callable[[], object] = int, **params: Any
    ) -> list[list[int]]:
        """All prompts at once; their outputs in order."""
        names = [f"g{len(self.requests):06d}-{i:06d}" for i in range(len(prompts))]
        for name, prompt in zip(names, prompts, strict=True):
            self.submit(name, prompt, **params)
        self.run(on_step)
        return [self.output(name) for name in names]

    def features(self, prompt: Sequence[int]) -> torch.Tensor:
        """Features of a prompt that the worker's drafters get; it may be prefilled in chunks."""
        prefill, seen = self.worker.target.prefill, []

        def noted(batch: object) -> Any:
            found = prefill(batch)
            seen.append(found[1].clone())
            return found

        self.worker.target.prefill = noted
        self.generate([prompt], max_new_tokens=1)
        del self.worker.target.prefill
        return torch.cat(seen)

    @property
    def states(self) -> dict[int, Any]:
        """States that the controller keeps of running requests, by request row."""
        return self.worker.controller.states

    def rounds(self, rid: str) -> tuple[int, int]:
        """Verified rounds of a request, and the drafts they accepted."""
        req = self.requests[rid]
        return req.spec_verify_ct, req.spec_num_correct_drafts

    def check_leaks(self) -> None:
        """SGLang's own idle check: every slot is free or in the tree, every request row is free. Nor do we keep a row.
        Raises otherwise.
        """
        checker = self.scheduler.invariant_checker
        leaking, messages = checker._check_all_pools(self.scheduler.pool_stats_observer.get_pool_stats())
        assert not leaking, "\n".join(messages)
        checker._check_req_pool()
        if hasattr(self.worker, "stages"):
            assert not self.worker.stages.lifecycle.leaks()


@contextlib.contextmanager
def engine(
    model: Path,
    *,
    whiflash: dict[str, Any] | None = None,
    arms: Sequence[Any] = (),
    rank: int = 0,
    port: int | None = None,
    retract: int = 0,
    **arguments: Any,
) -> Iterator[Engine]:
    """Start an engine in this process.

    Convolutions' inputs are kept in the target's type, like KV: rounded, they would depend on how prompts were
    chunked. Host pools of less than a megabyte may take any memory; SGLang would leave 10 GiB to others.

    Args:
        whiflash: draft path (`draft`) if any, and flags as to `Engine(...)`: `{"draft": D, "whiflash_router": "ar"}`.
        arms: further drafters beside those that the settings name.
        rank: of this process, of those that serve the model together; port: where they meet.
        retract: SGLang retracts a request every so many steps in which several run; 0: for want of memory only.
        arguments: SGLang's server arguments.
    """
    from sglang.srt.entrypoints.engine import Engine as SglangEngine
    from sglang.srt.managers import scheduler as managing
    from sglang.srt.mem_cache.pool_host import base
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs

    load_plugins()
    _collect()
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
        options["speculative_algorithm"] = "WHIFLASH"
        if (draft := flags.pop("draft", None)) is not None:
            options["speculative_draft_model_path"] = str(draft)
        options |= flags
    os.environ.setdefault("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE", "1")
    with (
        patch.dict(os.environ, SGLANG_MAMBA_CONV_DTYPE=options["dtype"]),
        patch.object(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", 0),
        patch.multiple(managing, TEST_RETRACT=retract > 0, TEST_RETRACT_INTERVAL=retract or 3),
        _process_groups(),
        _sockets(),
        _input_buffers(),
        _experts(),
    ):
        server_args = SglangEngine.server_args_class(**options)
        server_args.resolve_once()
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=rank))
        with _with_arms(arms), _unwatched():
            ports = PortArgs.init_new(server_args)
            ports = ports if port is None else replace(ports, nccl_port=port)
            scheduler = managing.Scheduler(server_args, ports)
        scheduler.output_streamer.send_to_detokenizer = _Discard()
        with torch.inference_mode():
            yield Engine(scheduler)


_collections = itertools.count()


def _collect() -> None:
    """Let go of the last engine: a scheduler is a cycle, and the test that read it is done with it by now.

    Modules that the first engine's start imports are never garbage. Frozen, they are not looked through at every later
    collection, of which SGLang makes one, too: they took most of an engine's start.
    """
    gc.collect()
    if next(_collections) < 2:
        gc.freeze()


@contextlib.contextmanager
def _process_groups() -> Iterator[None]:
    """Leave none behind. A start that failed half-way would make the next one wait for them, and each has threads."""
    from sglang.srt.distributed import parallel_state

    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if parallel_state._SELF_PP is not None:  # the one that SGLang forgets
            parallel_state._SELF_PP.destroy()
            parallel_state._SELF_PP = None
        parallel_state.destroy_distributed_environment()


@contextlib.contextmanager
def _sockets() -> Iterator[None]:
    """Close the sockets that the engine opens. Nobody reads them, so what was sent is dropped."""
    contexts: list[zmq.Context[Any]] = []
    make = zmq.Context

    def opened(*args: Any) -> zmq.Context[Any]:
        contexts.append(make(*args))
        return contexts[-1]

    try:
        with patch.object(zmq, "Context", opened):
            yield
    finally:
        for context in contexts:
            context.destroy(linger=0)


@contextlib.contextmanager
def _input_buffers() -> Iterator[None]:
    """SGLang shares the inputs of graphs in its process: one that was captured in inference mode would be handed on to
    the next engine, which starts outside it and cannot write to it.
    """
    from sglang.srt.model_executor import input_buffers

    try:
        yield
    finally:
        input_buffers._forward_input_buffer_pool.clear()


@contextlib.contextmanager
def _experts() -> Iterator[None]:
    """Forget the place of a target's experts, which the process keeps; the next target has other ones, or none."""
    from sglang.srt.runtime_context import get_resources

    try:
        yield
    finally:
        get_resources().expert_location_metadata = None


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """No watchdog: its thread never ends and holds the scheduler, and a test that steps slowly is not stuck.

    No load figures in shared memory: nobody reads them, and nobody would remove the file.
    """
    from sglang.srt.managers import scheduler
    from sglang.srt.utils.watchdog import Watchdog

    with (
        patch.object(scheduler, "create_scheduler_watchdog", lambda *_, **__: Watchdog.create("engine", None)),
        patch.object(scheduler, "create_load_snapshot_writer", lambda *_, **__: None),
    ):
        yield


@contextlib.contextmanager
def _with_arms(arms: Sequence[Any]) -> Iterator[None]:
    """Let the worker find `arms` beside the drafters that it builds itself."""
    from whiflash_sglang.serve import worker

    build, more = worker.build_drafters, {arm.arm: arm for arm in arms}
    with patch.object(worker, "build_drafters", lambda *args, **named: build(*args, **named) | more):
        yield


class _Discard:
    """Sink of the scheduler's outputs: the tests read its requests instead."""

    def send_output(self, *_: Any, **__: Any) -> None:
        return
