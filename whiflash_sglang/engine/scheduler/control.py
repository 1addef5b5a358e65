"""Read the worker's state and change its policy while it serves, by SGLang's internal-state messages."""

import asyncio
import itertools
import os
from typing import Any, get_args

from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
from sglang.srt.managers.scheduler_components import internal_state
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController
from sglang.srt.runtime_context import get_parallel

from whiflash_sglang.copying.tenants import HANDLES
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.hosts import SilentReplicaError
from whiflash_sglang.settings.config import PolicyChange, RouterName

KEY = "whiflash"
FORGET = f"{KEY}.forget"
EVERYBODY = -1
"""The value in place of a tenant's handle that means all tenants."""
ROUTERS: tuple[str, ...] = get_args(RouterName)

FIRST_PAUSE = 0.01
"""Seconds before the replicas are asked for their states again; doubled every time."""

_questions = itertools.count()
"""Numbers of requests for states. An answer has its request's process and number, so a late one is recognised."""


async def states_of(manager: Any, seconds: float) -> list[dict[str, Any]]:
    """Return WHIFLASH's state of every replica of a server.

    Args:
        manager: SGLang's tokenizer manager. seconds: to wait for all replicas.

    Raises:
        SilentReplicaError: at least one has not answered by then.
    """
    manager.auto_create_handle_loop()
    ask, pause = manager.get_internal_state_communicator, FIRST_PAUSE
    try:
        async with asyncio.timeout(seconds):
            while True:
                request = state_request()
                states = [answer.internal_state.get(KEY, {}) for answer in await ask(request)]
                if all(state.pop("question", None) == request.rid for state in states):
                    return states
                # A replica that is one answer behind would stay so, but answers that arrive in this pause are dropped.
                await asyncio.sleep(pause)
                pause *= 2
    except TimeoutError:
        # SGLang asks one question at a time. These are the answers to it, which may be somebody else's question.
        heard = [int(answer.rid) for answer in ask._result_values or ()]
        raise SilentReplicaError(heard, ask._fan_out, seconds) from None


def state_request() -> GetInternalStateReq:
    """Make the request that asks a scheduler for our state only.

    SGLang's own request, which anybody's `GET /server_info` sends, does not get this state: two readings of it reveal
    how many drafts of the running requests were accepted.
    """
    return GetInternalStateReq(rid=f"{KEY}.{os.getpid()}.{next(_questions)}")


class InternalState(SchedulerInternalStateController):  # type: ignore[misc]
    """SGLang's controller, which also answers requests for our state, changes our policy and forgets tenants."""

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        replica, worker, rid = get_parallel().dp_rank, self.scheduler.draft_worker, str(recv_req.rid)
        if rid.startswith(f"{KEY}."):
            ours = {**worker.snapshot(), "replica": replica, "question": rid}
            answer = GetInternalStateReqOutput(internal_state={KEY: ours})
        else:
            answer = super().get_internal_state(recv_req)
        answer.rid = str(replica or 0)
        return answer

    def _update_handlers(self) -> dict[str, Any]:
        return super()._update_handlers() | _handlers(self.scheduler.draft_worker)


def encode(change: dict[str, Any]) -> dict[str, float]:
    """Encode a valid `PolicyChange` for SGLang's message, which carries only numbers: a router becomes its index."""
    values = PolicyChange.model_validate(change).model_dump(exclude_none=True)
    if "router" in values:
        values["router"] = ROUTERS.index(values["router"])
    return {f"{KEY}.{key}": value for key, value in values.items()}


def _decoded(key: str, value: Any) -> dict[str, Any]:
    """Decode a `PolicyChange` of one field. Raises ConfigError for a value that `encode` does not make."""
    field = key.removeprefix(f"{KEY}.")
    if type(value) not in (int, float):
        raise ConfigError(f"a number is needed (got {value!r})")
    if field == "router":
        if type(value) is not int or not 0 <= value < len(ROUTERS):
            raise ConfigError(f"a router's index from 0 to {len(ROUTERS) - 1} is needed (got {value!r})")
        value = ROUTERS[value]
    return {field: value}


def encode_forget(handle: int | None) -> dict[str, int]:
    """Encode for SGLang's message that the tenant with this handle, or all tenants, shall be forgotten."""
    return {FORGET: EVERYBODY if handle is None else handle}


def _handlers(worker: Any) -> dict[str, Any]:
    def validate(key: str, value: Any) -> None:
        try:
            worker.settings_with(_decoded(key, value))
        except ConfigError as error:
            raise internal_state.UpdateRejected(f"{key}: {error}") from None

    def apply(key: str, value: Any) -> None:
        worker.reconfigure(_decoded(key, value))

    def forget(key: str, value: Any) -> None:
        worker.forget(None if value == EVERYBODY else value)

    policy = internal_state._UpdateHandler(validate, apply)
    return {f"{KEY}.{field}": policy for field in PolicyChange.model_fields} | {
        FORGET: internal_state._UpdateHandler(_is_handle, forget)
    }


def _is_handle(key: str, value: Any) -> None:
    if type(value) is not int or not EVERYBODY <= value < HANDLES:
        raise internal_state.UpdateRejected(f"{key}: a handle is needed (got {value!r})")
