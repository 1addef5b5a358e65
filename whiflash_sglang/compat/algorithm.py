"""WHIFLASH as a speculative algorithm of SGLang's registry."""

from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.managers.overlap_utils import FutureMap
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from whiflash_sglang.compat.carried import ALGORITHM, settings_of
from whiflash_sglang.errors import ConfigError

DEFAULT_RUNNING_REQUESTS = 48
"""As upstream's speculative algorithms: rings and draft buffers are sized by it."""


class WhiflashAlgorithm(CustomSpecAlgo):  # type: ignore[misc]
    """What the scheduler asks of an algorithm. Deliberately not `is_eagle()`: only the bigram keys are borrowed."""

    def handle_server_args(self, server_args: Any) -> None:
        """Fix the numbers the KV reservation is computed from: the widest block of any arm."""
        settings = settings_of(server_args)
        width = max(settings.eagle_steps + 1, widest_block(server_args))
        if settings.lookup.enabled:
            width = max(width, settings.lookup.max_width + 1)
        if settings.backlog_tokens <= width:
            raise ConfigError(
                f"--whiflash-backlog-tokens {settings.backlog_tokens} is too few: a round commits up to {width} "
                f"tokens; give at least {width + 1}, or narrow the widest arm (lookup.max_width, eagle_steps or "
                "block_size in whiflash.json)"
            )
        server_args.speculative_num_draft_tokens = width
        server_args.speculative_num_steps = 1
        server_args.speculative_eagle_topk = 1
        if resolving_view(server_args).max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS

    def supports_ragged_verify(self) -> bool:
        return False  # Rows are packed eagerly; captured graphs pad.

    def carries_draft_hidden_states(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def create_future_map(
        self,
        device: Any,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> FutureMap:
        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)


def widest_block(server_args: Any) -> int:
    """Tokens of a DFlash block under these arguments."""
    from whiflash_sglang.checkpoints import block_size_of

    settings = settings_of(server_args)
    return block_size_of(settings.dflash, settings.block_size)


_REFUSED = {
    "enable_hierarchical_cache": "--enable-hierarchical-cache (draft KV would not follow the host tier)",
    "enable_lora": "--enable-lora",
    "enable_unified_memory": "--enable-unified-memory",
    "enable_watermark": "--enable-watermark (its state is not kept per verified position)",
    "enable_two_batch_overlap": "--enable-two-batch-overlap",
}


def validate(server_args: Any) -> None:
    """Stop the start where the flags cannot work together. Raises ConfigError naming the flag."""
    cfg = resolving_view(server_args)
    if not hasattr(server_args, "_whiflash"):
        raise ConfigError(
            "WHIFLASH was chosen after the arguments were parsed; pass it to the launcher or to Engine"
        )
    for field, flag in _REFUSED.items():
        if getattr(cfg, field, False):
            raise ConfigError(f"WHIFLASH does not work with {flag}; remove it")
    for field, flag in (("tp_size", "--tp-size"), ("pp_size", "--pp-size"), ("dp_size", "--dp-size")):
        if int(getattr(cfg, field, 1) or 1) != 1:
            raise ConfigError(f"WHIFLASH runs on one device for now; {flag} must be 1")
    if cfg.grammar_backend == "outlines":
        raise ConfigError(
            "WHIFLASH does not work with --grammar-backend outlines (it cannot take a token back, as drafts need); "
            "use xgrammar or llguidance"
        )
    if cfg.disaggregation_mode not in (None, "null"):
        raise ConfigError(
            "WHIFLASH does not work with prefill/decode disaggregation; remove --disaggregation-mode"
        )


def register() -> None:
    """Put WHIFLASH into the registry. Raises ValueError if another plugin took the name."""

    @SpeculativeAlgorithm.register(  # type: ignore[untyped-decorator]
        ALGORITHM, supports_overlap=True, validate_server_args=validate, spec_class=WhiflashAlgorithm
    )
    def worker_class(server_args: Any) -> type:
        from whiflash_sglang.worker import WhiFlashWorker

        return WhiFlashWorker
