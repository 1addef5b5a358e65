"""Reading the worker's state and changing its policy while it serves, over SGLang's internal-state messages."""

from functools import wraps
from typing import Any, get_args

from sglang.srt.managers.scheduler_components import internal_state
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController

from whiflash_sglang.compat.carried import is_ours
from whiflash_sglang.compat.patching import replace
from whiflash_sglang.config import PolicyChange, RouterName
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.lookup.memory import Tenant, handle_of

KEY = "whiflash"
FORGET = f"{KEY}.forget"
EVERYBODY = -1
"""In place of a tenant's handle."""
ROUTERS: tuple[str, ...] = get_args(RouterName)


def install() -> None:
    """Idempotent."""
    replace(SchedulerInternalStateController, "_add_speculative", _reporting)
    replace(SchedulerInternalStateController, "_update_handlers", _updating)


def _reporting(original: Any) -> Any:
    @wraps(original)
    def add(self: Any, state: dict[str, Any]) -> None:
        original(self, state)
        if is_ours(self.scheduler):
            state[KEY] = self.scheduler.draft_worker.snapshot()

    return add


def encode(change: dict[str, Any]) -> dict[str, float]:
    """A valid `PolicyChange` as SGLang's message carries it: numbers only, so a router travels as its index."""
    values = {key: value for key, value in change.items() if value is not None}
    if "router" in values:
        values["router"] = ROUTERS.index(values["router"])
    return {f"{KEY}.{key}": value for key, value in values.items()}


def _decoded(key: str, value: Any) -> dict[str, Any]:
    field = key.removeprefix(f"{KEY}.")
    return {field: ROUTERS[int(value)] if field == "router" else value}


def encode_forget(tenant: Tenant | None) -> dict[str, int]:
    """Forget one tenant, or all, as SGLang's message carries it."""
    return {FORGET: EVERYBODY if tenant is None else handle_of(tenant)}


def _updating(original: Any) -> Any:
    @wraps(original)
    def handlers(self: Any) -> dict[str, Any]:
        found: dict[str, Any] = original(self)
        if is_ours(self.scheduler):
            worker = self.scheduler.draft_worker

            def validate(key: str, value: Any) -> None:
                try:
                    worker.settings_with(_decoded(key, value))
                except (ConfigError, IndexError) as error:
                    raise internal_state.UpdateRejected(f"{key}: {error}") from None

            def apply(key: str, value: Any) -> None:
                worker.reconfigure(_decoded(key, value))

            def forget(key: str, value: Any) -> None:
                worker.forget(None if value == EVERYBODY else value)

            handler = internal_state._UpdateHandler(validate, apply)
            found |= {f"{KEY}.{field}": handler for field in PolicyChange.model_fields}
            found[FORGET] = internal_state._UpdateHandler(_is_handle, forget)
        return found

    return handlers


def _is_handle(key: str, value: Any) -> None:
    if not isinstance(value, int):
        raise internal_state.UpdateRejected(f"{key}: not a tenant's handle")
