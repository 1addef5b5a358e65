"""Reading the worker's state and changing its policy while it serves, over SGLang's internal-state messages."""

import asyncio
import itertools
import os
from collections.abc import Mapping
from typing import Any, get_args

from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput, SetInternalStateReq
from sglang.srt.managers.scheduler_components import internal_state
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController
from sglang.srt.runtime_context import get_parallel

from whiflash_sglang.copying.tenants import HANDLES
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.files.hosts import SilentReplicaError
from whiflash_sglang.settings.config import PolicyChange, RouterName
from whiflash_sglang.updates.versions import MOST

KEY = "whiflash"
FORGET = f"{KEY}.forget"
VERSION = f"{KEY}.version"
STATE, SWITCHES = "state", "switches"
"""Parts of our state that a question may be about."""
EVERYBODY = -1
"""In place of a handle."""
ROUTERS: tuple[str, ...] = get_args(RouterName)

FIRST_PAUSE = 0.01
"""Seconds before a question is asked again; doubled every time."""

LONGEST_PAUSE = 0.16
"""Seconds between two questions whether a switch has ended, at most."""

_questions = itertools.count()
"""Answers carry their question's process and number: one that comes too late is not taken for another's."""


async def states_of(manager: Any, seconds: float, about: str = STATE) -> list[dict[str, Any]]:
    """Our state of every replica of a server.

    Args:
        manager: SGLang's tokenizer manager. seconds: to wait for them. about: which part, as of `state_request`.

    Raises:
        SilentReplicaError: at least one has not answered by then.
    """
    manager.auto_create_handle_loop()
    ask, pause = manager.get_internal_state_communicator, FIRST_PAUSE
    try:
        async with asyncio.timeout(seconds):
            while True:
                request = state_request(about)
                answers = await ask(request)
                states = [answer.internal_state.get(KEY, {}) for answer in answers]
                if all(state.pop("question", None) == request.rid for state in states):
                    return states
                # A replica that is an answer behind would stay so: what comes while nobody asks is dropped.
                await asyncio.sleep(pause)
                pause *= 2
    except TimeoutError:
        # One question is asked at a time: these are the answers to it, which may be another's, SGLang's own too.
        heard = [int(answer.rid) for answer in ask._result_values or ()]
        raise SilentReplicaError(heard, ask._fan_out, seconds) from None


async def switched(manager: Any, ticket: str, seconds: float) -> str:
    """Wait for the end of a switch: why a replica refused it; empty: none did.

    Args:
        ticket: of the message that asked for it. manager, seconds: as of `states_of`.

    Raises:
        SilentReplicaError: at least one did not answer a question in time.
    """
    pause = FIRST_PAUSE
    while True:
        ended = [state["ended"] for state in await states_of(manager, seconds, SWITCHES)]
        if all(ticket in outcomes for outcomes in ended):
            return next((outcomes[ticket] for outcomes in ended if outcomes[ticket]), "")
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def change_request(message: Mapping[str, float]) -> SetInternalStateReq:
    """Asks the schedulers for changes; a switch among them begins, and ends later, under the request's id."""
    return SetInternalStateReq(server_args=dict(message), rid=_rid("change"))


def state_request(about: str = STATE) -> GetInternalStateReq:
    """Asks a scheduler for our state alone: all of it (`STATE`), or which switches of weights have ended (`SWITCHES`).

    SGLang's own request, which anybody's `GET /server_info` sends, gets no such state: two readings of it reveal
    what was accepted of the requests that run.
    """
    return GetInternalStateReq(rid=_rid(about))


def _rid(about: str) -> str:
    return f"{KEY}.{about}.{os.getpid()}.{next(_questions)}"


class InternalState(SchedulerInternalStateController):  # type: ignore[misc]
    """SGLang's, of a scheduler of ours: our questions are answered, and policy, tenants and versions can be changed."""

    def get_internal_state(self, recv_req: GetInternalStateReq) -> Any:
        replica, worker, rid = get_parallel().dp_rank, self.scheduler.draft_worker, str(recv_req.rid)
        if rid.startswith(f"{KEY}."):
            ended = rid.startswith(f"{KEY}.{SWITCHES}.")
            state = {"ended": dict(worker.weights.outcomes)} if ended else worker.snapshot()
            ours = {**state, "replica": replica, "question": rid}
            answer = GetInternalStateReqOutput(internal_state={KEY: ours})
        else:
            answer = super().get_internal_state(recv_req)
        answer.rid = str(replica or 0)
        return answer

    def set_internal_state(self, recv_req: SetInternalStateReq) -> Any:
        self._ticket = str(recv_req.rid)
        return super().set_internal_state(recv_req)

    def _update_handlers(self) -> dict[str, Any]:
        return super()._update_handlers() | _handlers(self.scheduler.draft_worker, self._ticket)


def encode(change: dict[str, Any]) -> dict[str, float]:
    """A valid `PolicyChange` as SGLang's message carries it: numbers only, so a router travels as its index."""
    values = PolicyChange.model_validate(change).model_dump(exclude_none=True)
    if "router" in values:
        values["router"] = ROUTERS.index(values["router"])
    return {f"{KEY}.{key}": value for key, value in values.items()}


def _decoded(key: str, value: Any) -> dict[str, Any]:
    """A `PolicyChange` of one field. Raises ConfigError for what `encode` would not have made."""
    field = key.removeprefix(f"{KEY}.")
    if type(value) not in (int, float):
        raise ConfigError(f"a number is needed (got {value!r})")
    if field == "router":
        if type(value) is not int or not 0 <= value < len(ROUTERS):
            raise ConfigError(f"a router's index from 0 to {len(ROUTERS) - 1} is needed (got {value!r})")
        value = ROUTERS[value]
    return {field: value}


def encode_forget(handle: int | None) -> dict[str, int]:
    """Forget whoever has this handle, or all, as SGLang's message carries it."""
    return {FORGET: EVERYBODY if handle is None else handle}


def _handlers(worker: Any, ticket: str) -> dict[str, Any]:
    def validate(key: str, value: Any) -> None:
        try:
            worker.settings_with(_decoded(key, value))
        except ConfigError as error:
            raise internal_state.UpdateRejected(f"{key}: {error}") from None

    def apply(key: str, value: Any) -> None:
        worker.reconfigure(_decoded(key, value))

    def forget(key: str, value: Any) -> None:
        worker.forget(None if value == EVERYBODY else value)

    def can_switch(key: str, value: Any) -> None:
        if type(value) is not int or not 0 <= value < MOST:
            raise internal_state.UpdateRejected(f"{key}: a version's number is needed (got {value!r})")
        if worker.weights is None:
            raise internal_state.UpdateRejected(f"{key}: the server was started without versions")

    def switch(key: str, value: Any) -> None:
        worker.weights.ask(value, ticket)

    policy = internal_state._UpdateHandler(validate, apply)
    return {f"{KEY}.{field}": policy for field in PolicyChange.model_fields} | {
        FORGET: internal_state._UpdateHandler(_is_handle, forget),
        VERSION: internal_state._UpdateHandler(can_switch, switch),
    }


def _is_handle(key: str, value: Any) -> None:
    if type(value) is not int or not EVERYBODY <= value < HANDLES:
        raise internal_state.UpdateRejected(f"{key}: a handle is needed (got {value!r})")
