"""An arm whose server does not start: it is named at once, the others are measured, and the command fails."""

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from chat_app import serving
from patience import wait_until
from rich.console import Console

from whiflash_lab.bench import runner
from whiflash_lab.bench.arms import Arm, Subject
from whiflash_lab.bench.cells import Answer, Cell
from whiflash_lab.bench.command import judge
from whiflash_lab.bench.fleet import Fleet
from whiflash_lab.bench.pages import render
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Reference
from whiflash_lab.bench.runner import Plan, Runner, Step
from whiflash_lab.servers import ServerError
from whiflash_sglang.errors import ConfigError, WhiflashError
from whiflash_sglang.files.progress import Lines

LOG = "the server stopped:\nloading\nValueError: no such drafter\n"


@pytest.fixture
def url() -> Iterator[str]:
    with serving() as answering:
        yield answering.url


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

    def make(arguments: Sequence[str], log: Path | None) -> Starting:
        return Starting(arguments, url, said)

    with Fleet(make) as fleet:
        runner = Runner(Plan(subject, tuple(arms), ()), fleet, bar)  # type: ignore[arg-type]
        runner._start(arms)
        assert sorted(fleet.clients) == sorted(set(names) - set(broken))
    return runner.unavailable, said.getvalue()


def test_it_is_named_while_the_others_still_start_and_plain_decoding_must(url: str) -> None:
    lost, said = started(["none", "auto", "EAGLE3"], ["auto"], url)
    assert lost == {"auto": "the server did not start: ValueError: no such drafter"}
    assert "auto: the server did not start: ValueError: no such drafter\n" in said
    with pytest.raises(WhiflashError, match="plain decoding: the server did not start"):
        started(["none", "auto"], ["none"], url)


@pytest.mark.parametrize("category", ["overall", "loops"])
def test_no_category_has_the_name_of_a_row_of_every_report(category: str) -> None:
    with pytest.raises(ConfigError, match=f"category '{category}'"):
        Plan(None, (), (Prompt("p", category, ()),))


IN_TURN = {"none": 9, "auto": 9, "EAGLE3": 0}
"""Starts of each arm's server that succeed."""
AT_ONCE = {"auto": 1, "none": 2, "EAGLE3": 2}


@pytest.mark.parametrize(
    ("last", "ending", "why"),
    [
        (AT_ONCE, ServerError("OSError: no memory"), "2 of 4 repetitions: plain decoding: .*no memory"),
        (AT_ONCE, KeyboardInterrupt(), "2 of 4 repetitions: interrupted"),
        (IN_TURN, KeyboardInterrupt(), "2 of 3 servers: interrupted"),
        (IN_TURN, SystemExit(143), "2 of 3 servers: interrupted"),
        (IN_TURN, httpx.ReadError(""), "2 of 3 servers: ReadError"),
    ],
)
def test_a_server_that_does_not_start_again_loses_no_measurement(
    last: dict[str, int], ending: BaseException, why: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One arm does not start for the second repetition; plain decoding and another do not for the third. In turn it is
    the last of three servers."""
    starts: Counter[str] = Counter()

    class Ending(Starting):
        def __enter__(self) -> object:
            (arm,) = self._arguments
            starts[arm] += 1
            if starts[arm] > last[arm]:
                raise ending if arm == "none" or last is IN_TURN else ServerError(LOG)
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
    plan = Plan(subject, arms, (Prompt("p", "chat", ()),), repetitions=4, interleave=last is AT_ONCE)
    said = io.StringIO()
    with Fleet(lambda arguments, *_: Ending(arguments, url, said)) as fleet:  # type: ignore[arg-type, return-value]
        report = Runner(plan, fleet, Lines(Console(file=said, width=200))).run()
    why = f"ended after {why}"
    for server in report.provenance["servers"].values():
        server["attention_backend"] = "torch_native"
    assert re.search(why, said.getvalue())
    lost = "- auto: .*no such drafter\n(- EAGLE3: .*\n)?" * plan.interleave
    assert re.search(f"\n{lost}- The run {why}", render(report))
    measured_of = {arm: figures["overall"].answers for arm, figures in report.arms.items()}
    assert measured_of == (AT_ONCE if plan.interleave else {"none": 4, "auto": 4})
    with pytest.raises(WhiflashError, match=why):
        judge(report)
