"""`whiflash bench --url`: servers that run already, of one protocol and any kind."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from chat_app import ChatApp, serving
from typer.testing import CliRunner, Result

from whiflash_lab.bench.report import BenchReport
from whiflash_lab.bench.runner import WARM_UP_PROMPTS
from whiflash_sglang.cli.app import app as whiflash
from whiflash_sglang.errors import WhiflashError


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": "a", "messages": [{"role": "user", "content": "a"}], "category": "one"},
        {"request": {"input": "b"}, "response": {}, "id": "b", "category": "two"},
        {"id": "c", "turns": ["c", "d"], "category": "one"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def bench(prompts: Path, *arguments: str) -> tuple[Result, BenchReport | None]:
    out = prompts.with_name("out.json")
    result = CliRunner().invoke(whiflash, ["bench", "--prompts", str(prompts), "--out", str(out), *arguments])
    return result, BenchReport.model_validate_json(out.read_text()) if out.exists() else None


def differing(app: ChatApp, text: str) -> list[str]:
    return ["You said ", "it" if text == "a" else text, ". Bye."]


def test_two_servers_are_compared(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHIFLASH_API_KEY", "SECRET")
    ours_models = [{"id": "other", "owned_by": "sglang"}, {"id": "/models/m", "owned_by": "sglang"}]
    with prompts.open("a") as file:
        for name in ("long", "large"):
            file.write(json.dumps({"id": name, "turns": [name, "more"]}) + "\n")
    plain_has: dict[str, Any] = {"key": "SECRET", "refused": {"long": 400, "large": 413}}
    with serving(**plain_has) as plain, serving(reply=differing, models=ours_models, verifications=1) as ours:
        given = ("--url", f"plain={plain.url}/v1", "--url", f"ours={ours.url}")
        result, report = bench(prompts, *given, "--concurrency", "1,3", "--repetitions", "2")
        assert result.exit_code == 0, result.output
    assert report is not None
    assert (list(report.arms), report.base, report.unavailable) == (["plain", "ours"], "plain", {})
    for load in report.loads:
        overall = load.ratios["ours"].none["overall"]
        assert 0 < overall.low <= overall.ratio <= overall.high
        assert [load.arms[name]["overall"].mismatches for name in report.arms] == [0, 1]
    figures = report.arms["ours"]["overall"]
    assert (figures.answers, figures.output_tokens, figures.acceptance_length) == (8, 12, 2.0)
    assert figures.answer_ms is not None
    assert report.arms["plain"]["overall"].acceptance_length is None
    assert [(d["arm"], d["prompt"], d["position"]) for d in report.differences] == [("ours", "a", 9)] * 2
    assert set(report.provenance["left_out"]) == {"long", "large"}
    assert all(body["stream"] for body in plain.asked), "a whole answer's parser may write another text than a stream's"
    page = prompts.with_name("out.md").read_text()
    assert "| ours | closed-1 | a | 9 |" in page
    assert "- ours: url http://127.0.0.1:" in page
    assert "model /models/m, server sglang, version 0.5.23" in page
    assert "SECRET" not in page + report.model_dump_json() + result.output
    assert plain.paths == ours.paths == {"/v1/models", "/server_info", "/v1/chat/completions"}, "nothing is emptied"
    assert {body["model"] for body in ours.asked} == {"/models/m"}
    assert len({body["cache_salt"] for body in plain.asked if len(body["messages"]) == 3}) > 4


def test_one_server_of_another_kind_has_figures_of_its_own(prompts: Path) -> None:
    with serving(models=[{"id": "m", "owned_by": "somebody"}]) as server:
        result, report = bench(prompts, "--url", server.url.replace("//", "//user:PASS@"), "--repetitions", "1")
        assert {key for body in server.asked for key in body} == {
            *("model", "messages", "temperature", "seed", "max_tokens", "stream", "stream_options")
        }
    name = server.url.removeprefix("http://")
    assert result.exit_code == 0, result.output
    assert report is not None
    assert (list(report.arms), report.ratios) == ([name], {})
    assert "PASS" not in result.output + report.model_dump_json()
    assert f"Prompts may have been in the prefix cache of {name}." in result.output


def test_as_many_requests_are_in_flight_as_asked_for(prompts: Path) -> None:
    """Also more than the connections that a client keeps by default."""
    together = threading.Barrier(120)

    def reply(app: ChatApp, text: str) -> list[str]:
        if len(app.asked) > 120 + WARM_UP_PROMPTS:
            together.wait(timeout=60)
        return ["Yes."]

    prompts.write_text("".join(json.dumps({"id": str(n), "turns": [str(n)]}) + "\n" for n in range(120)))
    with serving(reply=reply) as server:
        result, _ = bench(prompts, "--url", server.url, "--concurrency", "120", "--repetitions", "1")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("dying", ["plain", "ours"])
def test_what_was_measured_before_a_server_dies_stays(dying: str, prompts: Path) -> None:
    def reply(app: ChatApp, text: str) -> list[str] | None:
        references = 4 if dying == "plain" else 0
        return None if len(app.asked) > references + 3 + 4 + 2 else ["You said ", text, "."]

    with serving(**({"reply": reply} if dying == "plain" else {})) as plain, serving(reply=reply) as ours:
        result, report = bench(prompts, "--url", f"plain={plain.url}", "--url", f"ours={ours.url}")
    assert result.exit_code == 1
    assert report is not None
    assert "the answer ended early, after 2 characters" in result.output
    assert report.arms[dying]["overall"].answers == 4, "its whole repetition"
    assert report.ratios["ours"].none["overall"].ratio > 0
    if dying == "plain":
        assert "ended after 1 of 3 repetitions: plain: a request failed" in report.provenance["ended"]
    else:
        assert list(report.unavailable) == ["ours"]
        assert report.arms["plain"]["overall"].answers == 12


def test_a_server_that_dies_in_its_first_repetition_keeps_its_prompts(prompts: Path) -> None:
    def reply(app: ChatApp, text: str) -> list[str] | None:
        return None if len(app.asked) > 3 + 2 else ["Yes."]

    with serving() as plain, serving(reply=reply) as ours:
        _, report = bench(prompts, "--url", f"plain={plain.url}", "--url", f"ours={ours.url}", "--repetitions", "1")
    assert report is not None
    assert (report.arms["ours"]["overall"].answers, report.arms["plain"]["overall"].answers) == (2, 4)
    assert set(report.ratios["ours"].none) == {"one", "two", "overall"}


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (500, b"\xff"),
        (200, b"data: \xff\n\n"),
        (200, b'{"error": {"message": "no"}}'),
        (200, b'data: {"choices": [{"delta": {"tool_calls": [{"function": "f"}]}}]}\n\n'),
    ],
)
def test_an_answer_of_another_shape_ends_no_more_than_its_arm(status: int, answer: bytes, prompts: Path) -> None:
    with serving() as plain, serving(answers=(status, answer)) as ours:
        _, report = bench(prompts, "--url", f"plain={plain.url}", "--url", f"ours={ours.url}", "--repetitions", "1")
        alone, _ = bench(prompts, "--url", ours.url)
    assert list(report.unavailable if report else ()) == ["ours"]
    assert isinstance(alone.exception, WhiflashError), alone.exception


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"models": [{"id": "org/N"}]}, "ours serves org/N, and plain org/M: figures of different models"),
        ({"models": None}, "/v1/models answered 200 without the expected JSON"),
        ({"models": []}, "/v1/models answered 200 without the expected JSON"),
        ({"key": "K3Y"}, "refused the key for /v1/models"),
        (None, "http://127.0.0.1:1 does not answer"),
        ("/v2", "/v2 has no /v1/models (404): check the URL"),
    ],
)
def test_a_server_that_cannot_be_compared_ends_the_run(other: Any, said: str, prompts: Path) -> None:
    fields, path = (other, "") if isinstance(other, dict) else ({}, other)
    with serving() as plain, serving(**fields) as ours:
        url = "http://user:PASS@127.0.0.1:1" if other is None else f"{ours.url}{path}"
        result, report = bench(prompts, "--url", f"plain={plain.url}", "--url", f"ours={url}")
        assert not plain.asked
    assert (result.exit_code, report) == (1, None)
    assert said in str(result.exception) + result.output
    assert "PASS" not in str(result.exception) + result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "auto"], "takes no --arms: remove it"),
        (["--no-interleave", "--server-args", "--tp 2"], "takes no --server-args, --no-interleave: remove it"),
        (["--url", "a=http://host"], "--url a=http://host: this name is taken"),
        (["--url", "none=http://host"], "--url none=http://host: this name is taken"),
        (["--url", "b=host:1"], "--url b=host:1: give NAME=URL"),
        (["--url", "a table|b=http://host"], "give NAME=URL"),
        (["--url", "b=http://u:PASS@host:x"], "--url b=http://host:x: give NAME=URL"),
    ],
)
def test_options_of_servers_that_it_starts_are_refused(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(whiflash, ["bench", "--url", "a=http://127.0.0.1:1", *arguments])
    assert said in str(result.exception) + result.output
    assert "PASS" not in str(result.exception) + result.output
