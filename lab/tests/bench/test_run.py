"""A whole benchmark run on tiny models: real servers, real requests, every part of the report."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from server_host import Forked, Server, ServerHost
from tiny_models import tiny_bundle, tiny_target

from whiflash_lab.bench.arms import build_arms
from whiflash_lab.bench.cells import Journal, Load
from whiflash_lab.bench.fleet import Fleet
from whiflash_lab.bench.pages import render
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.report import BenchReport
from whiflash_lab.bench.runner import SEEDED, Plan, Runner
from whiflash_lab.bench.subject import build_subject
from whiflash_lab.servers import ServerError
from whiflash_sglang.errors import WhiflashError

pytestmark = pytest.mark.server

ARMS = ["none", "EAGLE3", "auto", "ar", "diffusion"]
LOADS = (Load(value=1), Load(value=3))
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def prompts() -> tuple[Prompt, ...]:
    def user(text: str) -> tuple[dict[str, str]]:
        return ({"role": "user", "content": text},)

    as_json = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    return (
        Prompt("first", "chat", user("Say something.")),
        Prompt("turns", "chat", user("What is this?"), follow_ups=("And that?",)),
        Prompt("object", "json", user("A number, please."), response_format=as_json),
        Prompt("third", "chat", user("abc def ghi jkl")),
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("bench")
    target = tiny_target(root / "target")
    bundle = tiny_bundle(root / "bundle", target)
    (root / "scratch").mkdir()
    subject = build_subject(str(target), str(bundle), "float32", (SEEDED,), root / "scratch", ARMS)
    arms = build_arms(ARMS, subject)
    return Plan(subject, tuple(arms), prompts(), loads=LOADS, repetitions=2, max_tokens=16, restart=True)


@pytest.fixture(scope="module")
def journal(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return Journal(tmp_path_factory.mktemp("journal") / "cells.jsonl", plan.fingerprint)


@pytest.fixture(scope="module")
def started() -> list[Sequence[str]]:
    """Arguments of every server that the run of `report` started."""
    return []


@pytest.fixture(scope="module")
def fleet(host: ServerHost) -> Iterator[Callable[..., Fleet]]:
    """Fleets that note the arguments of each server they start. Starting one again gives the one that runs."""
    kept: dict[tuple[str, ...], Server] = {}

    def make(started: list[Sequence[str]], server: type[Forked] = Forked) -> Fleet:
        def start(arguments: Sequence[str], log: object, checkout: object) -> Forked:
            started.append(tuple(arguments))
            return server(host, arguments, kept)

        return Fleet(start)

    yield make
    for server in kept.values():
        server.close()


@pytest.fixture(scope="module")
def report(
    plan: Plan, fleet: Callable[..., Fleet], journal: Journal, started: list[Sequence[str]]
) -> BenchReport:
    with fleet(started) as servers, _silent() as progress:
        return Runner(plan, servers, journal, progress).run(resume=False)


def _silent() -> Progress:
    return Progress(console=Console(file=io.StringIO()))


def test_every_arm_answers_every_prompt(report: BenchReport, plan: Plan) -> None:
    assert report.unavailable == {}
    assert [load.load for load in report.loads] == list(LOADS)
    for load in report.loads:
        assert set(load.arms) == set(ARMS)
        for figures in load.arms.values():
            overall = figures["overall"]
            assert overall.answers + (figures["loops"].answers if "loops" in figures else 0) >= 2
            assert overall.output_tokens_per_s is not None
            assert overall.output_tokens_per_s > 0
    assert sum(report.categories.values()) == len(prompts()) + 1, "the second turn is a prompt of its own"


def test_every_repetition_has_servers_of_its_own(
    report: BenchReport, plan: Plan, started: list[Sequence[str]]
) -> None:
    assert len(started) == plan.repetitions * len({arm.server for arm in plan.arms})
    assert "new servers for each" in render(report)


def test_outputs_equal_plain_decoding(report: BenchReport) -> None:
    """float32: only ties may differ, and they are listed."""
    assert [d for d in report.differences if d["verdict"] != "tie"] == []


def test_seeded_answers_equal_plain_decoding(plan: Plan, fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """Sampled ones, at one request and at three; without the servers' flag they are not compared."""
    sampled = replace(
        plan,
        arms=tuple(build_arms(["none", "auto"], plan.subject)),
        sampling={"temperature": 0.8, "top_p": 0.95},
        repetitions=1,
        restart=False,
    )
    with fleet([]) as servers, _silent() as progress:
        journal = Journal(tmp_path / "cells.jsonl", sampled.fingerprint)
        report = Runner(sampled, servers, journal, progress).run(resume=False)
    assert report.differences == []
    assert report.arms["auto"]["overall"].mismatches == 0
    assert "Sampled with temperature 0.8, top_p 0.95, a seed a prompt." in render(report)
    assert not replace(sampled, subject=replace(plan.subject, common=())).compares
    assert not replace(sampled, subject=replace(plan.subject, dtype="bfloat16")).compares


def test_acceptance_and_rounds(report: BenchReport) -> None:
    assert report.arms["none"]["overall"].acceptance_length == 1.0
    for arm in ("auto", "ar", "diffusion"):
        overall = report.arms[arm]["overall"]
        assert overall.acceptance_length >= 1.0
        assert overall.round_ms is not None
        assert min(overall.round_ms.model_dump().values()) >= 0
        assert overall.switch_share is not None
        assert 0 < overall.switch_share < 1
    assert report.arms["ar"]["overall"].switches_per_100_tokens == 0
    assert report.arms["EAGLE3"]["overall"].round_ms is None


def test_ratios_and_page(report: BenchReport) -> None:
    auto = report.ratios["auto"]
    assert auto.none["overall"].low <= auto.none["overall"].high
    assert auto.static_arm["overall"] in ("EAGLE3", "ar", "diffusion")
    page = render(report)
    assert "| auto |" in page
    assert "/tmp" not in page, "no directory of this machine in a report"
    assert BenchReport.model_validate_json(report.model_dump_json()) == report


def test_a_finished_run_resumes_without_asking_again(
    plan: Plan, fleet: Callable[..., Fleet], journal: Journal, report: BenchReport
) -> None:
    before, servers = journal.read(), []
    with fleet(servers) as started, _silent() as progress:
        again = Runner(plan, started, journal, progress).run(resume=True)
    assert len(servers) == len({arm.server for arm in plan.arms}), "nothing is left that wants new servers"
    assert journal.read() == before
    assert again.arms == report.arms


def test_a_server_that_does_not_start_again_loses_no_measurement(
    plan: Plan, fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    arms = tuple(arm for arm in plan.arms if arm.name in ("none", "auto"))
    small = replace(plan, arms=arms, prompts=plan.prompts[:1], loads=LOADS[:1])
    journal = Journal(tmp_path / "cells.jsonl", small.fingerprint)
    started: list[Sequence[str]] = []

    class Once(Forked):
        def __enter__(self) -> Forked:
            if "WHIFLASH" in self._arguments and started.count(self._arguments) > 1:
                raise ServerError("OSError: no memory")
            return super().__enter__()

    with (
        fleet(started, Once) as servers,
        _silent() as progress,
        pytest.raises(WhiflashError, match=r"auto: .*no memory.*--resume"),
    ):
        Runner(small, servers, journal, progress).run(resume=False)
    assert {(cell.arm, cell.repetition) for cell in journal.read()} == {("none", 0), ("auto", 0)}
