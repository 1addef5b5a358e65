"""The drafters' share of the KV budget, and room for what is reserved beyond a request's text.

SGLang sizes its KV pool from bytes per token and a fixed overhead. Both drafters keep KV beside every target
slot, and the rings are allocated up front, so both numbers grow by what the worker reserves.

A decoding request holds slots for two blocks beyond its text, but with pages of one token a row of the request table
has room for little more than one behind the context's end: near it the write would leave the row.
"""

from dataclasses import dataclass
from functools import wraps
from typing import Any

from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.model_executor import pool_configurator

from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.patching import replace
from whiflash_sglang.errors import ConfigError


@dataclass(slots=True)
class Reservation:
    """What the worker of this process asks for: bytes per KV slot, and bytes independent of the slots."""

    per_token: int = 0
    fixed: int = 0


_reservation = Reservation()


def reserve(per_token: int, fixed: int) -> None:
    """Called by the worker before the pools are sized."""
    _reservation.per_token, _reservation.fixed = per_token, fixed


def install() -> None:
    """Account for both wherever SGLang sizes its pools. Idempotent."""
    replace(pool_configurator, "create_memory_pool_configurator", _accounting)
    replace(kv_cache_configurator, "get_req_to_token_extra_context_len", _holding_the_reserve)


def _holding_the_reserve(original: Any) -> Any:
    @wraps(original)
    def columns() -> int:
        """Columns of a request's row beyond the context."""
        reserve = get_alloc_reserve_per_decode() if serves_ours() else 0
        return max(int(original()), reserve)

    return columns


def _accounting(original: Any) -> Any:
    @wraps(original)
    def create(kvc: Any, *args: Any, **kwargs: Any) -> Any:
        configurator = original(kvc, *args, **kwargs)
        if serves_ours() and not kvc.is_draft_worker:
            if type(configurator) is not pool_configurator.DefaultPoolConfigurator:
                raise ConfigError(
                    f"WHIFLASH cannot size draft KV for this target's cache ({type(configurator).__name__}); "
                    "full-attention targets only for now"
                )
            configurator._cell_size += _reservation.per_token
            configurator._fixed_overhead_bytes += _reservation.fixed
        return configurator

    return create
