"""Contents of ours in SGLang's internal-state message: everything wrong is refused with a reason, nothing raises."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GetInternalStateReqOutput, SetInternalStateReq
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.copying.tenants import HANDLES
from whiflash_sglang.engine.scheduler import control
from whiflash_sglang.errors import ConfigError
from whiflash_sglang.serve.worker import WhiFlashWorker
from whiflash_sglang.settings.config import Flags, PolicyChange, Settings, changed, resolve

KEYS = [*(f"{control.KEY}.{field}" for field in PolicyChange.model_fields), control.FORGET]
NUMBERS = st.one_of(st.floats(), st.integers(), st.integers(-(10**400), 10**400), st.integers(-3, 20), st.booleans())
ANYTHING = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(), st.binary(), st.complex_numbers()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
)
SETTINGS = resolve(Flags(), embedded_bundle())


class Worker:
    """Parts of a worker that a message may change."""

    settings_with = WhiFlashWorker.settings_with
    _has_heads = True

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.settings = settings
        self.forgotten: list[int | None] = []
        self.publisher = SimpleNamespace(flush=lambda: None)

    def reconfigure(self, change: Any) -> None:
        self.settings = self.settings_with(change)

    def forget(self, tenant: int | None) -> None:
        self.forgotten.append(tenant)

    def snapshot(self) -> dict[str, Any]:
        return {"rounds": 1}


def send(worker: Worker, message: Any) -> bool:
    """Whether a scheduler with `worker` takes the message."""
    algorithm = SimpleNamespace(is_none=lambda: False)
    scheduler = SimpleNamespace(spec_algorithm=algorithm, draft_worker=worker)
    controller = control.InternalState(scheduler, False)
    return bool(controller.set_internal_state(SetInternalStateReq(server_args=message)).updated)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, min_size=1))
def test_no_message_raises_and_a_refused_one_changes_nothing(message: dict[str, Any]) -> None:
    worker = Worker()
    if not send(worker, message):
        assert (worker.settings, worker.forgotten) == (SETTINGS, [])
        return
    for key, value in message.items():
        assert type(value) in (int, float)
        assert math.isfinite(value)
        assert type(value) is int or key.endswith("threshold")
        assert value >= 0 or key.endswith("neural_router_threshold") or (key, value) == (control.FORGET, -1)
    if (index := message.get("whiflash.router")) is not None:
        assert worker.settings.router == control.ROUTERS[index]


@pytest.mark.parametrize("key", KEYS)
def test_a_refusal_names_its_key(key: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not send(Worker(), {key: math.nan})
    assert key in caplog.text


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(list(PolicyChange.model_fields)), ANYTHING))
def test_every_change_that_the_route_takes_survives_the_message(change: dict[str, Any]) -> None:
    """A body that `POST /whiflash/policy` lets through can be sent, and the scheduler takes it."""
    import msgspec

    try:
        wanted = changed(SETTINGS, change)
    except ConfigError:
        return
    message = SetInternalStateReq(server_args=control.encode(change))
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=SetInternalStateReq)
    worker = Worker()
    assert send(worker, arrived.server_args)
    assert worker.settings == wanted


@pytest.mark.parametrize("router", control.ROUTERS)
def test_a_router_arrives_under_its_name(router: str) -> None:
    worker = Worker(SETTINGS.model_copy(update={"uno": Path("adapter")}))
    assert send(worker, control.encode({"router": router}))
    assert worker.settings.router == router


def test_everybody_is_nobodys_handle() -> None:
    """A message that forgets one tenant must never be the one that forgets all."""
    assert control.encode_forget(None)[control.FORGET] not in range(HANDLES)


def test_only_who_asks_for_it_is_told_our_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang answers `GET /server_info` from the same state, to whom it does not ask for a key."""
    monkeypatch.setattr(
        SchedulerInternalStateController,
        "get_internal_state",
        lambda self, request: GetInternalStateReqOutput(internal_state={}),
    )
    monkeypatch.setattr(control, "get_parallel", lambda: SimpleNamespace(dp_rank=1))
    controller = control.InternalState(SimpleNamespace(draft_worker=Worker()), False)
    assert controller.get_internal_state(control.GetInternalStateReq()).internal_state == {}
    question = control.state_request()
    assert controller.get_internal_state(question).internal_state == {
        control.KEY: {"rounds": 1, "replica": 1, "question": question.rid}
    }
