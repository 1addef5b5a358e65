"""An arm whose server does not start: it is named at once, the others are measured, and the command fails. So is a
prompt that plain decoding does not take.
"""

import asyncio
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from patience import wait_until
from rich.console import Console
from rich.progress import Progress
from server_host import stand_in

from whiflash_lab.bench import reference, runner
from whiflash_lab.bench.arms import Arm, Subject, build_arms
from whiflash_lab.bench.cells import Answer, Cell
from whiflash_lab.bench.command import judge
from whiflash_lab.bench.fleet import Fleet
from whiflash_lab.bench.load import RefusedError
from whiflash_lab.bench.pages import render
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Reference
from whiflash_lab.bench.runner import CLOSED_ALONE, Plan, Runner, Step
from whiflash_lab.servers import ServerError
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.progress import Lines

LOG = "the server stopped:\nloading\nValueError: no such drafter\n"


@pytest.fixture
def url() -> Iterator[str]:
    with stand_in() as answering:
        yield answering


class Starting:
    """A server with `--broken` does not start; any other one is not up before the user has heard of that."""

    def __init__(self, arguments: Sequence[str], url: str, said: io.StringIO) -> None:
        self.url, self._arguments, self._said = url, arguments, said

    def __enter__(self) -> object:
        if "--broken" in self._arguments:
            raise ServerError(LOG)
        wait_until(lambda: "no such drafter" in self._said.getvalue())
        return self

    def close(self) -> None:
        pass


def started(names: Sequence[str], broken: Sequence[str], url: str) -> tuple[dict[str, str], str]:
    """Starts a server for each arm; which are lost, and what is said of it."""
    said = io.StringIO()
    arms = [Arm(name, name, ("--broken",) if name in broken else ()) for name in names]
    subject: Any = SimpleNamespace(hide_paths=list)
    bar = Lines(Console(file=said, width=200))

    def make(arguments: Sequence[str], log: Path | None, python: Path | None) -> Starting:
        return Starting(arguments, url, said)

    with Fleet(make) as fleet:
        runner = Runner(Plan(subject, tuple(arms), ()), fleet, bar)  # type: ignore[arg-type]
        runner._start(arms)
        assert sorted(fleet.clients) == sorted(set(names) - set(broken))
    return runner.unavailable, said.getvalue()


def test_it_is_named_while_the_others_still_start(url: str) -> None:
    lost, said = started(["none", "auto", "EAGLE3"], ["auto"], url)
    assert lost == {"auto": "the server did not start: ValueError: no such drafter"}
    assert "auto: the server did not start: ValueError: no such drafter\n" in said


def test_a_server_that_ends_takes_its_arms_alone(url: str) -> None:
    arms = [Arm("none", "none", ()), *(Arm(name, "shared", (), router=name) for name in ("ar", "auto"))]
    make: Any = lambda *_: Starting((), url, io.StringIO("no such drafter"))  # noqa: E731
    with Fleet(make) as fleet:
        plan = Plan(SimpleNamespace(hide_paths=list), tuple(arms), ())  # type: ignore[arg-type]
        runner = Runner(plan, fleet, Lines(Console(file=io.StringIO())))  # type: ignore[arg-type]
        runner._start(arms)
        fleet.clients["shared"] = httpx.Client(base_url="http://127.0.0.1:1")
        asyncio.run(runner._measure([Step(CLOSED_ALONE, name, 0, ("p",)) for name in ("ar", "auto")], None))
    assert runner.unavailable.keys() == {"ar", "auto"}
    assert "a request failed" in runner.unavailable["auto"]


def test_nothing_is_measured_without_plain_decoding(url: str) -> None:
    with pytest.raises(WhiflashError, match="plain decoding: the server did not start"):
        started(["none", "auto"], ["none"], url)


@pytest.mark.parametrize("ending", [ServerError("OSError: no memory"), KeyboardInterrupt()])
def test_a_server_that_does_not_start_again_loses_no_measurement(
    ending: BaseException, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One arm does not start for the second repetition; plain decoding and another do not for the third."""
    starts: Counter[str] = Counter()
    last = {"auto": 1, "none": 2, "EAGLE3": 2}

    class Ending(Starting):
        def __enter__(self) -> object:
            (arm,) = self._arguments
            starts[arm] += 1
            if starts[arm] > last[arm]:
                raise ending if arm == "none" else ServerError(LOG)
            return self

    async def measured(running: Runner, step: Step, asker: object) -> Cell:
        answer = Answer(prompt="p", seconds=1.0, ttft=0.1, tokens=(5,), forwards=1)
        return Cell(load=step.load, arm=step.arm, repetition=step.repetition, seconds=1.0, answers=(answer,))

    monkeypatch.setattr(
        runner, "ask_reference", lambda client, prompt, most: Reference(prompt, (1,), (5,), (9.0,), "a")
    )
    monkeypatch.setattr(runner, "flush", lambda client: None)
    monkeypatch.setattr(runner, "differences", lambda *_: [])
    monkeypatch.setattr(Runner, "_cell", measured)
    subject = Subject(target=tmp_path, bundle=tmp_path, eagle3=None, dflash=None, dtype="float32")
    arms = tuple(Arm(name, name, (name,)) for name in last)
    plan = Plan(subject, arms, (Prompt("p", "chat", ()),), repetitions=4)
    said = io.StringIO()
    with Fleet(lambda arguments, *_: Ending(arguments, url, said)) as fleet:  # type: ignore[arg-type, return-value]
        report = Runner(plan, fleet, Lines(Console(file=said, width=200))).run()
    ends = "plain decoding: .*no memory" if str(ending) else "interrupted"
    why = f"ended after 2 of 4 repetitions: {ends}"
    for server in report.provenance["servers"].values():
        server["attention_backend"] = "torch_native"
    assert re.search(why, said.getvalue())
    assert re.search(f"\n- auto: .*no such drafter\n(- EAGLE3: .*\n)?- The run {why}", render(report))
    measured_of = {arm: figures["overall"].answers for arm, figures in report.arms.items()}
    assert measured_of == {"none": 2, "EAGLE3": 2, "auto": 1}
    with pytest.raises(WhiflashError, match=why):
        judge(report)


def test_a_prompt_that_the_server_does_not_take_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def answering(client: Any, prompt: Prompt, max_tokens: int, fields: object = None) -> Reference:
        if prompt.id == "long":
            raise RefusedError("prompt long: longer than the context")
        return Reference(prompt, (1,), (5,), (9.0,), "short")

    monkeypatch.setattr(runner, "ask_reference", answering)
    monkeypatch.setattr(runner, "flush", lambda client: None)
    subject = Subject(target=tmp_path, bundle=tmp_path, eagle3=None, dflash=None, dtype="float32")
    prompts = tuple(Prompt(name, "chat", ({"role": "user", "content": "?"},)) for name in ("long", "fits"))
    fleet: Any = SimpleNamespace(clients={"none": "none"})
    plan = runner.Plan(subject, tuple(build_arms(["none"], subject)), prompts)
    running = runner.Runner(plan, fleet, Progress(disable=True))
    running._ask_references()
    assert list(running._references) == ["fits"]
    assert running.left_out == {"long": "prompt long: longer than the context"}
    nothing = runner.Runner(replace(plan, prompts=prompts[:1]), fleet, Progress(disable=True))
    with pytest.raises(WhiflashError, match="took no prompt: prompt long"):
        nothing._ask_references()
    refusing = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(400)), base_url="http://x")
    monkeypatch.undo()
    with pytest.raises(RefusedError, match="prompt fits"):
        reference.ask_reference(refusing, prompts[1], 8)
