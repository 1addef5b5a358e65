"""Run SGLang's offline engine for training data: answers by plain decoding, and features of texts.

The engine is SGLang's own; its schedulers have a `FeatureRecorder` (`recorder.py`). A text's prefill computes the
whole text, because prefixes are not cached, and prompts run without graphs.
"""

import asyncio
import signal
from collections.abc import Coroutine, Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import HTTPException
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.model_executor.cuda_graph_config import Backend
from torch import Tensor

from whiflash_sglang.engine import patching
from whiflash_sglang.engine.forward.captured import may_capture
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.formats.config_json import read_json_config
from whiflash_train.engine import recorder

R = TypeVar("R")
TERMINATED = 143
"""Exit code of a command that SIGTERM ended."""
_NOT_OURS = (
    *("pp_size", "dp_size", "attn_dp_size", "attn_cp_size", "dcp_size", "enable_prefill_cp", "nnodes"),
    *("enable_pdmux", "disaggregation_mode", "dllm_algorithm", "return_hidden_states_mode"),
    *("allow_auto_truncate", "skip_tokenizer_init", "tokenizer_path"),
)
"""Arguments with which a scheduler would lack some layers' outputs of a text, or grammars their tokenizer."""


class OfflineEngine:
    """Runs SGLang's processes until `close`. Requests are coroutines; `completed` runs them."""

    def __init__(
        self, model: Path, layers: list[int], place: tuple[str, Path, Path], arguments: Mapping[str, Any], **chosen: Any
    ) -> None:
        """Start the engine.

        Args:
            layers: target layers whose outputs are the features, ascending.
            place: the target's name in the configuration, the directory of the matrices with which drafters begin, and
                the one through which schedulers pass features to this process.
            arguments: the user's arguments for SGLang's engine. chosen: the caller's.

        Raises:
            ConfigError: the model's layers cannot be captured; SGLang does not know an argument, or the user must not
                set it here.
            IncompatibleEngineError: SGLang is another release.
        """
        patching.require_version()
        architecture = (read_json_config(model).get("architectures") or ["?"])[0]
        if not may_capture(architecture):
            raise ConfigError(
                f"{model} is a {architecture}, whose layers' outputs SGLang cannot capture: no drafter can be trained "
                "for it"
            )
        options = {"model_path": str(model), "disable_radix_cache": True, "enable_multimodal": False, **chosen}
        if chosen.get("device") == "cuda":
            options["cuda_graph_backend_prefill"] = Backend.DISABLED
        ours = {*options, *_NOT_OURS}
        taken = [name for name in arguments if name in ours or name.startswith("speculative")]
        if taken:
            raise ConfigError(
                f"data.engine.{taken[0]} cannot be set: training data need plain decoding, one replica, and features "
                "of whole texts; remove it"
            )
        for directory in place[1:]:
            directory.mkdir(parents=True, exist_ok=True)
        self._states, self._names = place[2], count()
        self._clear()
        # SGLang handles signals in its event loop, which nobody runs after the last request: `close` restores these.
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
        # SGLang lets a subclass of its engine replace the scheduler's process.
        started = partial(recorder.run, layers, *place)
        kind = type("RecordingEngine", (Engine,), {"run_scheduler_process_func": staticmethod(started)})
        try:
            self._engine = kind(**options, **arguments)
        except TypeError as error:
            raise ConfigError(f"data.engine: {error}") from None

    async def answer(self, tokens: list[int], **sampling: Any) -> tuple[list[int], bool]:
        """Return an answer, and whether an end token ends it. Raises ValueError if SGLang refuses the request."""
        result = await self._ask(tokens, sampling)
        reason = result["meta_info"]["finish_reason"]
        if reason["type"] == "abort":
            raise ValueError(reason.get("message", "SGLang aborted it"))
        return list(result["output_ids"]), reason["type"] == "stop"

    async def features(self, tokens: list[int], dtype: torch.dtype) -> Tensor:
        """Compute the outputs of the layers for every token of a text, followed by the state after the final norm.

        Returns:
            [T, (layers + 1) · H] of `dtype`, which must be the target's.
        """
        name = f"{recorder.WANTED}{next(self._names)}"
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        await self._ask(tokens, sampling, rid=name)
        file = self._states / name
        try:
            states = torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype)
        except FileNotFoundError:
            raise WhiflashError(f"SGLang returned no features of a text of {len(tokens)} tokens") from None
        file.unlink()
        return states.view(len(tokens), -1)

    async def _ask(self, tokens: list[int], sampling: dict[str, Any], **options: Any) -> Any:
        try:
            return await self._engine.async_generate(input_ids=tokens, sampling_params=sampling, **options)
        except HTTPException as error:  # SGLang has no room or is stopping, so others would fail too
            raise WhiflashError(f"SGLang gave up a text of {len(tokens)} tokens: {error.detail}") from error

    def completed(self, requests: Iterator[Coroutine[Any, Any, R]], at_once: int) -> Iterator[R]:
        """Yield the requests' results as they complete, with `at_once` running. Raises SystemExit after SIGTERM."""
        loop, running = self._engine.loop, set[asyncio.Task[R]]()
        try:
            while True:
                while len(running) < at_once and (request := next(requests, None)) is not None:
                    running.add(loop.create_task(request))
                if not running:
                    return
                first = asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                done, running = loop.run_until_complete(first)
                yield from [task.result() for task in done]
                if self._engine.tokenizer_manager.gracefully_exit:
                    # SGLang's handler takes SIGTERM and would wait until all requests have ended.
                    raise SystemExit(TERMINATED)
        finally:
            for task in running:
                task.cancel()

    def close(self) -> None:
        """End SGLang's processes, restore the signal handlers, and remove files of features that nobody read."""
        for number, handler in self._handlers.items():
            self._engine.loop.remove_signal_handler(number)
            signal.signal(number, handler)
        self._engine.shutdown()
        self._clear()

    def _clear(self) -> None:
        for left in self._states.glob(f"{recorder.WANTED}*"):
            left.unlink()
