"""What a worker tells of itself when it is asked. Imports no SGLang."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from whiflash_sglang.config import Settings

if TYPE_CHECKING:
    import torch

    from whiflash_sglang.cache.tokens import TokenTable
    from whiflash_sglang.drafters.base import Drafter
    from whiflash_sglang.round.catch_up import DraftSync
    from whiflash_sglang.round.quarantine import Quarantine
    from whiflash_sglang.routing.controller import Controller
    from whiflash_sglang.telemetry.round_clock import RoundClock
    from whiflash_sglang.telemetry.tally import Tally


class Cached(Protocol):
    """A target's KV cache: its slots, and the slot table [request rows, ctx] int32."""

    @property
    def kv_slots(self) -> int: ...
    @property
    def slot_table(self) -> "torch.Tensor": ...


class Observed(Protocol):
    """What figures are read from: a worker."""

    @property
    def settings(self) -> Settings: ...
    @property
    def clock(self) -> "RoundClock": ...
    @property
    def tally(self) -> "Tally": ...
    @property
    def controller(self) -> "Controller": ...
    @property
    def sync(self) -> "DraftSync": ...
    @property
    def quarantine(self) -> "Quarantine": ...
    @property
    def drafters(self) -> Mapping[str, "Drafter"]: ...
    @property
    def target(self) -> Cached: ...
    @property
    def tokens(self) -> "TokenTable": ...


def state_of(worker: Observed) -> dict[str, Any]:
    """For `GET /whiflash/state` and the benchmark: policy, running requests, where the rounds' time went."""
    return {
        "policy": worker.controller.policy.name,
        "arms": sorted(worker.drafters),
        "requests": len(worker.controller.states),
        "quarantined": dict(worker.quarantine.reasons),
        "left_out": dict(worker.quarantine.left_out),
        "faulty_drafts": dict(worker.quarantine.faults),
        **worker.clock.snapshot(),
        **worker.tally.snapshot(),
        "costs": worker.controller.costs.snapshot(worker.drafters),
        "memory": memory_of(worker),
        **{arm: state for arm, d in worker.drafters.items() if (state := d.snapshot())},
    }


def memory_of(worker: Observed) -> dict[str, int]:
    """Bytes by scope: what is kept beside the target and its cache, weights apart."""
    draft_kv = sum(drafter.kv_bytes_per_token() for drafter in worker.drafters.values())
    kept = {
        f"{arm}_{name}": size
        for arm, drafter in worker.drafters.items()
        for name, size in drafter.host_bytes().items()
    }
    return {
        "draft_kv": draft_kv * worker.target.kv_slots,
        "backlog": worker.sync.bytes_for(len(worker.target.slot_table)),
        "text": worker.tokens.data.nbytes,
        **kept,
    }
