"""A whole benchmark run on tiny models: real servers, real requests, every part of the report."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from server_host import Forked, Server, ServerHost
from tiny_models import tiny_bundle, tiny_target
from typer.testing import CliRunner

from whiflash_lab.bench.arms import build_arms
from whiflash_lab.bench.cells import Load
from whiflash_lab.bench.fleet import Fleet
from whiflash_lab.bench.pages import render
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.report import BenchReport
from whiflash_lab.bench.runner import Plan, Runner
from whiflash_lab.bench.subject import build_subject
from whiflash_sglang.cli.app import app

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
        Prompt("drawn", "chat", user("Say more."), fields={"temperature": 0.8, "top_p": 0.95}),
        Prompt("object", "json", user("A number, please."), fields={"response_format": as_json}),
        Prompt("third", "chat", user("abc def ghi jkl")),
    )


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("bench")
    target = tiny_target(root / "target")
    bundle = tiny_bundle(root / "bundle", target)
    (root / "scratch").mkdir()
    subject = build_subject(str(target), str(bundle), ("--dtype", "float32"), root / "scratch", ARMS)
    arms = build_arms(ARMS, subject)
    return Plan(subject, tuple(arms), prompts(), loads=LOADS, repetitions=2, max_tokens=16)


@pytest.fixture(scope="module")
def started() -> list[Sequence[str]]:
    """Arguments of every server that the run of `report` started."""
    return []


@pytest.fixture(scope="module")
def kept() -> Iterator[dict[tuple[str, ...], Server]]:
    """Servers that run, by their arguments."""
    servers: dict[tuple[str, ...], Server] = {}
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture(scope="module")
def fleet(host: ServerHost, kept: dict[tuple[str, ...], Server]) -> Callable[..., Fleet]:
    """Fleets that note the arguments of each server they start. Starting one again gives the one that runs."""

    def make(started: list[Sequence[str]], server: type[Forked] = Forked) -> Fleet:
        def start(arguments: Sequence[str], log: object) -> Forked:
            started.append(tuple(arguments))
            return server(host, arguments, kept)

        return Fleet(start)

    return make


@pytest.fixture(scope="module")
def report(plan: Plan, fleet: Callable[..., Fleet], started: list[Sequence[str]]) -> BenchReport:
    with fleet(started) as servers, _silent() as progress:
        return Runner(plan, servers, progress).run()


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


def test_every_repetition_has_servers_of_its_own(report: BenchReport, plan: Plan, started: list[Sequence[str]]) -> None:
    assert len(started) == plan.repetitions * len({arm.server for arm in plan.arms})
    assert "new servers for each" in render(report)


def test_outputs_equal_plain_decoding(report: BenchReport) -> None:
    """float32: only ties may differ, and they are listed. Sampled answers are not compared."""
    assert [d for d in report.differences if d["verdict"] != "tie"] == []
    assert report.arms["auto"]["overall"].mismatches == 0
    page = render(report)
    assert "Sampled with temperature 0.8, top_p 0.95, a seed a prompt." in page
    assert "Sampled answers were not compared." in page


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


def test_servers_that_run_already(report: BenchReport, kept: dict[tuple[str, ...], Server], tmp_path: Path) -> None:
    rows = [{"id": p.id, "turns": [p.messages[0]["content"], *p.follow_ups], **p.fields} for p in prompts()]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    plain = next(server.url for flags, server in kept.items() if "--speculative-algorithm" not in flags)
    auto = next(server.url for flags, server in kept.items() if flags[-2:] == ("--whiflash-router", "auto"))
    urls = [f"--url={name}={url}" for name, url in {"plain": plain, "again": plain, "auto": auto}.items()]
    options = ["--prompts", tmp_path / "prompts.json", "--out", tmp_path / "r.json", "--concurrency", "1,3"]
    done = CliRunner().invoke(app, ["bench", *urls, *map(str, options), "--max-tokens", "16", "--repetitions", "1"])
    assert done.exit_code == 0, done.output
    found = BenchReport.model_validate_json((tmp_path / "r.json").read_text())
    assert {name: figures["overall"].mismatches for name, figures in found.arms.items()}["again"] == 0
    assert found.ratios.keys() == {"again", "auto"}
    assert (found.arms["auto"]["overall"].acceptance_length or 0) >= 1.0
    server = found.provenance["servers"]["auto"]
    assert (server["model"], server["speculative_algorithm"]) == ("bench", "WHIFLASH")
    assert "# Benchmark\n\nbench, " in done.output
