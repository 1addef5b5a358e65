"""Asking every replica for its state: who does not answer is named, and an answer that comes late is nobody else's."""

import asyncio
import selectors
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
from sglang.srt.managers.scheduler_components.internal_state import SchedulerInternalStateController

from whiflash_sglang.engine.scheduler import control
from whiflash_sglang.files.hosts import SilentReplicaError


class Server:
    """A tokenizer manager with SGLang's own way to ask, and two replicas that answer when they are let.

    on_question: called with each question, to let replicas answer.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_question: Callable[["Server"], None]) -> None:
        self._patch, self._on_question = monkeypatch, on_question
        self.mail: list[list[GetInternalStateReq]] = [[], []]
        self.get_internal_state_communicator = FanOutCommunicator(self._asked, 2)

    def auto_create_handle_loop(self) -> None:
        return

    def answers(self, replica: int) -> None:
        """A replica answers its oldest question, as soon as the one who asks waits."""
        worker = SimpleNamespace(snapshot=lambda: {"rounds": 7})
        controller = control.InternalState(SimpleNamespace(draft_worker=worker), False)
        with self._patch.context() as patch:
            patch.setattr(
                SchedulerInternalStateController,
                "get_internal_state",
                lambda self, request: GetInternalStateReqOutput(internal_state={}),
            )
            patch.setattr(control, "get_parallel", lambda: SimpleNamespace(dp_rank=replica))
            answered = controller.get_internal_state(self.mail[replica].pop(0))
        asyncio.get_running_loop().call_soon(self.get_internal_state_communicator.handle_recv, answered)

    def _asked(self, question: GetInternalStateReq) -> None:
        for mail in self.mail:
            mail.append(question)
        self._on_question(self)


def one(server: Server) -> None:
    server.answers(0)


def test_who_does_not_answer_somebody_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks one question at a time: ours waits behind that of a `GET /server_info`."""
    server = Server(monkeypatch, one)

    async def ask() -> list[dict[str, Any]]:
        foreign = asyncio.create_task(server.get_internal_state_communicator(GetInternalStateReq()))
        await asyncio.sleep(0)
        try:
            return await control.states_of(server, 0.01)
        finally:
            foreign.cancel()

    with pytest.raises(SilentReplicaError, match="replica 1 of 2 has"):
        asyncio.run(ask())


def test_a_late_answer_is_not_the_next_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second replica answers the first question when the second one is asked, and from then on in time."""
    questions = 0

    def late(server: Server) -> None:
        nonlocal questions
        questions += 1
        server.answers(0)
        while questions > 1 and server.mail[1]:
            server.answers(1)

    server = Server(monkeypatch, late)

    async def ask() -> list[dict[str, Any]]:
        with pytest.raises(SilentReplicaError, match="replica 1 of 2 has"):
            await control.states_of(server, 0.01)
        return await control.states_of(server, 1e9)

    assert sorted(state["replica"] for state in asyncio.run(ask())) == [0, 1]
    assert questions == 3


class VirtualTime(selectors.SelectSelector):
    """Selector of a loop whose time passes only while everybody waits, and then at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits, and nothing will ever happen"
        self.now += timeout
        return super().select(0)

    def loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(self)
        loop.time = lambda: self.now  # type: ignore[method-assign]
        return loop


def test_a_replica_that_is_an_answer_behind_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stood still while a question timed out, and takes a second for each one: who asks again in less gets its
    answer to the question before, for ever.
    """
    asked, working = 0, False

    def busy(server: Server) -> None:
        nonlocal asked, working
        asked += 1
        server.answers(0)
        if not working:
            working = True
            asyncio.get_running_loop().call_later(1, done, server)

    def done(server: Server) -> None:
        nonlocal working
        server.answers(1)
        working = bool(server.mail[1])
        if working:
            asyncio.get_running_loop().call_later(1, done, server)

    server, time = Server(monkeypatch, busy), VirtualTime()
    server.mail[1].append(control.state_request())
    with asyncio.Runner(loop_factory=time.loop) as runner:
        states = runner.run(control.states_of(server, 30))
    assert [state["replica"] for state in states] == [0, 1]
    assert asked > 2, "it was never behind"
