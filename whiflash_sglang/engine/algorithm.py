"""WHIFLASH as a speculative algorithm of SGLang's registry."""

from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from whiflash_sglang.checkpoints.fit import TargetShape, block_size_of, check_drafters, read_layers
from whiflash_sglang.drafts import arms
from whiflash_sglang.engine import patching
from whiflash_sglang.engine.carried import ALGORITHM, asks_for_ours, settings_of
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.settings.config import Settings

DEFAULT_RUNNING_REQUESTS = 48
"""Default of --max-running-requests, as of SGLang's own speculative algorithms. It sizes rings and draft buffers."""


class WhiflashAlgorithm(CustomSpecAlgo):  # type: ignore[misc]
    """Answers SGLang's questions to an algorithm. It is not `is_eagle()`, of which we need only the bigram keys."""

    def handle_server_args(self, server_args: Any) -> None:
        """Set the arguments that SGLang computes its KV reservation from, by the widest block of any arm."""
        server_args.speculative_num_draft_tokens = widest_block(settings_of(server_args))
        server_args.speculative_num_steps = 1
        server_args.speculative_eagle_topk = 1
        if resolving_view(server_args).max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS

    def supports_ragged_verify(self) -> bool:
        return True  # A verification always has a layout of its rows, captured or not.

    def supports_grammar_overlap(self) -> bool:
        return True  # `serve/verify.py` passes the barrier, and makes masks while the target runs.

    def carries_draft_hidden_states(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def build_disagg_draft_input(self, batch: Any, last_tokens_tensor: Any, future_map: FutureMap) -> Any:
        from whiflash_sglang.engine.scheduler import disaggregation  # only schedulers need it

        return disaggregation.draft_input(batch, last_tokens_tensor, future_map)

    def create_future_map(
        self, device: Any, req_to_token_pool: Any, needs_cpu_seq_lens: bool = True, needs_confidence_relay: bool = False
    ) -> FutureMap:
        # Lengths go to the host only if the target's attention asks for them, since a plan needs only bounds.
        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)


def widest_block(settings: Settings) -> int:
    """Return the largest number of rows of a request in a verification: the widest arm's drafts and the bonus token."""
    width = settings.eagle_steps + 1 if arms.AR in settings.drafters else 1
    if arms.DIFFUSION in settings.drafters:
        width = max(width, block_size_of(settings.drafters[arms.DIFFUSION], settings.block_size))
    uno, others = settings.uno_drafts if settings.uno else 0, (settings.lookup, settings.structure)
    return max([width, uno + 1, *(arm.max_width + 1 for arm in others if arm.enabled)])


def validate(server_args: Any) -> None:
    """Stop the start if the arguments, the target or the drafters cannot work, judging by configurations only.

    Raises:
        WhiflashError: one sentence that names the flag, the model or the file. From the command line it ends the
            launcher, as argparse's errors do.
    """
    try:
        _judge(server_args)
    except WhiflashError as error:
        if getattr(server_args, "_whiflash_from_command_line", False):
            raise SystemExit(f"whiflash: error: {error}") from None
        raise


def _judge(server_args: Any) -> None:
    if not asks_for_ours(server_args):
        raise ConfigError("WHIFLASH was chosen after the arguments were parsed; pass it to the launcher or to Engine")
    from whiflash_sglang.engine.launch.facts import Launch
    from whiflash_sglang.engine.launch.refusals import UNCAPTURED, refusal_of

    launch = Launch.of(server_args)
    refusal = refusal_of(launch)
    if refusal is not None:
        raise ConfigError(refusal)
    drafters, shape = settings_of(server_args).drafters, TargetShape.of(launch.model)
    check_drafters(drafters, shape)
    is_uncaptured, sentence = UNCAPTURED
    if read_layers(drafters, shape) and is_uncaptured(launch):
        raise ConfigError(sentence.format(launch.architecture))


def register(worker: Callable[[], type]) -> None:
    """Add WHIFLASH to SGLang's registry. worker: imports and returns the worker's class when a worker is made.

    Raises:
        ValueError: another plugin took the name.
    """

    @SpeculativeAlgorithm.register(  # type: ignore[untyped-decorator]
        ALGORITHM, supports_overlap=True, validate_server_args=validate, spec_class=WhiflashAlgorithm
    )
    def worker_class(server_args: Any) -> type:
        # This is our first code that a scheduler calls, before it builds anything that a patch changes.
        patch_scheduler()
        return worker()


def patch_scheduler() -> None:
    """Install the patches that the worker needs in its scheduler's process. Idempotent.

    Raises:
        IncompatibleEngineError: a private name is missing or has changed.
    """
    patching.require_names()
    from whiflash_sglang.engine.forward import flash_backend, lora, target, triton_backend
    from whiflash_sglang.engine.scheduler import (
        disaggregation,
        hicache,
        kv_budget,
        radix,
        releases,
        scores,
        stops,
        subclass,
    )

    patching.install(disaggregation, hicache, lora, kv_budget, radix, releases, scores, stops, subclass, target)
    triton_backend.install()
    flash_backend.install()
