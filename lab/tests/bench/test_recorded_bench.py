"""Recorded conversations played against real servers that are forced along their text."""

import asyncio
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import pytest
from rich.console import Console
from rich.progress import Progress
from server_host import ServerHost
from tiny_models import tiny_bundle, tiny_target
from transformers import AutoTokenizer
from typer.testing import CliRunner

from whiflash_lab.bench.arms import NONE, Subject
from whiflash_lab.bench.cells import Answer, Cell, Load, Turn
from whiflash_lab.bench.fleet import Fleet
from whiflash_lab.bench.load import RequestError
from whiflash_lab.bench.pages import render
from whiflash_lab.bench.recorded import Player, Replayer, Talk, Task, recorded_arms, talks_of, with_pool
from whiflash_lab.bench.report import build_report
from whiflash_lab.bench.runner import Plan
from whiflash_lab.bench.subject import build_subject
from whiflash_lab.conversations import Conversation, RecordedTurn, read_recorded, renderer_of
from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ConfigError

EDITS = {"edits.jsonl": True, "edits-unseen.jsonl": False}
"""Shipped edits, and whether the file that is edited stands in their prompts."""
TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "my brown vow: sphinx of black quartz, judge it",
    "pack a brown box with five dozen liquor jugs",
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    rows = []
    for i in range(3):
        asked, answer = {"role": "user", "content": f"Edit {i}."}, TEXTS[i].replace("brown", f"b{i}own")
        said = [asked, {"role": "assistant", "content": f"Which one? {i}"}, {"role": "user", "content": "It."}]
        messages = [*said, {"role": "assistant", "content": answer}]
        prediction = {"type": "content", "content": TEXTS[i]}
        row = {"id": f"t{i}", "category": "edit", "task": "edits", "messages": messages}
        rows.append({**row, "prediction": prediction})
    path = tmp_path_factory.mktemp("recorded") / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_recorded(path)


def agent_and_subagent(path: Path, **fields: Any) -> list[Conversation]:
    """The second begins with the first one's first answer, and its last answer is the first one's tool result."""
    texts = ("Find the fox.", "Find it, you.", "Now.", "A jump.", "And?", "On the lawn.")
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    rest = [{"role": "tool", "content": texts[-1]}, {"role": "assistant", "content": "There: the lawn."}]
    records = [
        {"id": "agent", "messages": [*said[:2], *rest]},
        {"id": "subagent", "messages": said, "parent": "agent", "after": 1, **fields},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_recorded(path)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root = tmp_path_factory.mktemp("bench")
    target = tiny_target(root / "target")
    bundle = tiny_bundle(root / "bundle", target)
    return build_subject(str(target), str(bundle), ("--dtype", "float32"), root, ["lookup"])


@pytest.fixture(scope="module")
def talks(recorded: list[Conversation], subject: Subject) -> list[Talk]:
    return talks_of([recorded], renderer_of(subject.target, subject.bundle), max_tokens=200, room=600)[0]


def test_conversations_become_tasks(talks: list[Talk], recorded: list[Conversation], subject: Subject) -> None:
    assert [(talk.id, len(talk.tasks)) for talk in talks] == [("t0", 2), ("t1", 2), ("t2", 2)]
    first, last = (task.turn for task in talks[0].tasks)
    assert [task.known for task in talks[0].tasks] == [0, len(first.prompt) + len(first.answer) - 1]
    assert not first.predictions
    renderer = renderer_of(subject.target, subject.bundle)
    tokenizer = AutoTokenizer.from_pretrained(subject.target)

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens)))

    assert text(last.answer[:-1]) == TEXTS[0].replace("brown", "b0own")
    assert text(last.predictions["prediction"]) == TEXTS[0]
    assert text(last.predictions["useless"]) in TEXTS[1:]
    cut, left_out = talks_of([recorded], renderer, max_tokens=5, room=60)
    assert list(left_out) == ["t0, answer 1", "t1, answer 1", "t2, answer 1"]
    assert [[len(task.turn.answer) for task in talk.tasks] for talk in cut] == [[5]] * 3
    with pytest.raises(ConfigError, match="no record has a prediction"):
        recorded_arms(["auto+prediction"], subject, [])
    twice, _ = talks_of([[recorded[0]] * 2], renderer, max_tokens=5, room=600)
    assert [talk.id for talk in twice] == ["t0", "t0-2"], "each is played and has figures of its own"


def test_a_subagent_s_answers_are_between_its_parent_s(subject: Subject, tmp_path: Path) -> None:
    sizes = {"renderer": renderer_of(subject.target, subject.bundle), "max_tokens": 200, "room": 600}
    records = agent_and_subagent(tmp_path / "a.jsonl")
    talk, *others = talks_of([records, records * 2], **sizes)[0]
    assert [len(other.tasks) for other in others] == [len(talk.tasks)] * 2, "each has its own subagent"
    decode = AutoTokenizer.from_pretrained(subject.target).decode
    answers = [decode(list(task.turn.answer[:-1])) for task in talk.tasks]
    assert answers == ["Find it, you.", "A jump.", "On the lawn.", "There: the lawn."]
    for fields in ({"after": 3}, {"parent": "subagent"}):
        with pytest.raises(ConfigError, match=r"subagent: no '.*' with . answers is before it"):
            talks_of([agent_and_subagent(tmp_path / "a.jsonl", **fields)], **sizes)
    with pytest.raises(ConfigError, match="line 2, after: 0 is no count of answers of 'agent'"):
        agent_and_subagent(tmp_path / "a.jsonl", after=0)


@pytest.mark.parametrize("file", EDITS)
def test_the_shipped_edits_can_be_read(file: str) -> None:
    found = read_recorded(Path(__file__).parents[3] / "results" / "benchmark" / file)
    assert {one.category for one in found} == {"code", "document"}
    for one in found:
        assert one.prediction
        assert (one.prediction in one.messages[0]["content"]) is EDITS[file]
        before, after = one.prediction.split("\n"), one.messages[-1]["content"].split("\n")
        kept = len(set(before) & set(after)) / len(set(before))
        assert 0.8 < kept < 0.98


def test_a_conversation_s_answers_are_figures_of_one_prompt(talks: list[Talk]) -> None:
    """Each answer's first token is a prefill's; a first token's time is a turn's."""
    tokens = {talk.id: sum(len(task.turn.answer) for task in talk.tasks) for talk in talks}
    cells = [
        Cell(
            load=Load(value=1),
            arm=arm,
            repetition=repetition,
            seconds=seconds,
            answers=(
                Answer(
                    prompt=talk.id,
                    seconds=seconds,
                    ttft=None,
                    tokens=tuple(range(tokens[talk.id])),
                    forwards=(tokens[talk.id] - 2) // fewer,
                    prefills=2,
                ),
            ),
        )
        for repetition in range(2)
        for talk in talks
        for arm, seconds, fewer in ((NONE, 2.0, 1), ("auto", 1.0, 2))
    ]
    report = build_report(cells, dict.fromkeys(tokens, "edit"), [], {}, {})
    auto, plain = report.arms["auto"]["overall"], report.arms[NONE]["overall"]
    assert plain.acceptance_length == 1.0
    rounds = sum((own - 2) // 2 for own in tokens.values())
    assert auto.acceptance_length == pytest.approx((sum(tokens.values()) - 6) / rounds)
    assert auto.output_tokens_per_s == pytest.approx(sum(tokens.values()) / 3)
    assert (auto.ttft_ms, auto.tpot_ms) == (None, None)
    assert report.ratios["auto"].none["overall"].ratio == pytest.approx(2.0)


@pytest.fixture(scope="module")
def fleet(host: ServerHost) -> Iterator[Fleet]:
    with Fleet(lambda arguments, log: host.running(*arguments)) as made:
        yield made


@pytest.mark.server
def test_a_recorded_run(talks: list[Talk], subject: Subject, fleet: Fleet, tmp_path: Path) -> None:
    """Plain decoding is stock SGLang, which a pool of half of what the agents need makes evict."""
    subject = with_pool(subject, talks, 3, 0.5)
    arms = tuple(recorded_arms(["lookup+prediction+group", "lookup+useless", "none+sessions"], subject, talks))
    loads = (Load(value=1), Load(value=2))
    plan = Plan(subject, arms, tuple(talks), loads, repetitions=1, recorded=("log",))
    report = Replayer(plan, fleet, Progress(console=Console(file=io.StringIO()))).run()
    assert (report.unavailable, report.differences) == ({}, [])
    for load in report.loads:
        lengths = {arm: figures["overall"].acceptance_length for arm, figures in load.arms.items()}
        assert set(lengths) == {NONE, "lookup+prediction+group", "lookup+useless", "none+sessions"}
        assert lengths[NONE] == lengths["none+sessions"] == 1.0
        assert lengths["lookup+prediction+group"] > 1.2 * lengths["lookup+useless"]
        for turns in load.turns.values():
            assert [turn.tokens for turn in turns] == [
                fmean(len(talk.tasks[number].turn.answer) for talk in talks) for number in range(2)
            ]
            first, second = turns
            # A turn's prompt holds the one before with its answer, whose newest token has no KV yet.
            before = first.prompt + first.tokens
            assert before - 4 <= second.cached < before < second.prompt
            assert 0 < second.ttft <= second.seconds
        assert load.turns["lookup+prediction+group"][1].cached >= load.turns[NONE][1].cached - 1
        for jobs in load.jobs.values():
            assert 0 < jobs.cached < jobs.prompt
            assert jobs.ms.p50 > jobs.ttft_ms.p50
        assert load.jobs[NONE].faster is None
        assert load.jobs["none+sessions"].evicted is not None
    page = render(report)
    assert "| 2 | lookup+prediction+group |" in page
    assert "| all | lookup+prediction+group |" in page
    assert "Forced along the recorded text of log." in page
    assert f"| arm | tokens/s | over {NONE} |" in page
    assert f"| arm | seconds a job p50/p95 | faster than {NONE} |" in page
    assert "Every answer is the recorded one" in page

    url = fleet.reach("lookup+prediction+group")["base_url"]
    task = talks[0].tasks[0].turn
    params = {"max_new_tokens": 4, "custom_params": {"whiflash_forced": [1, 100_000]}}
    body = {"input_ids": list(task.prompt), "sampling_params": params}
    refused = httpx.post(f"{url}/generate", json=body, timeout=None)
    assert refused.status_code == 400
    assert "whiflash_forced[1]: must be a token id below" in refused.text
    turn = RecordedTurn(task.prompt, [*task.answer, 100_000])
    impossible = Talk("t", "edit", (), tasks=(Task(turn, "t", 0),))

    async def played(talk: Talk) -> Answer:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:
            return await Player(client, 8).ask(talk)

    with pytest.raises(RequestError, match="must be a token id"):
        asyncio.run(played(impossible))

    renderer = renderer_of(subject.target, subject.bundle)
    [talk], _ = talks_of([agent_and_subagent(tmp_path / "a.jsonl")], renderer, max_tokens=200, room=600)
    first, begun, _, last = asyncio.run(played(talk)).turns
    shared = first.prompt + first.tokens
    assert [turn.cached for turn in (begun, last)] == pytest.approx([shared, shared], abs=4)


def test_a_tool_s_time_is_cut_and_goes_on_while_subagents_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each conversation has a session, which is closed after its last answer, in nobody's time."""
    clock, told = [0.0], list[Any]()

    async def sleep(seconds: float) -> None:
        told.append(round(seconds))

    class Fake(Player):
        async def _answer(self, talk: Talk, task: Task, session: str | None) -> Any:
            clock[0] += 10
            told.append(session)
            return Turn(prompt=1, cached=0, tokens=1, ttft=1, seconds=1), [], 0

    def closed(request: httpx.Request) -> httpx.Response:
        clock[0] += 5
        told.append(("closed", json.loads(request.content)["session_id"]))
        return httpx.Response(200)

    async def played() -> Answer:
        async with httpx.AsyncClient(transport=httpx.MockTransport(closed), base_url="http://s") as client:
            waits = (("a", 0.0), ("sub", 0.0), ("a", 90.0))
            tasks = tuple(Task(RecordedTurn([], [], wait=wait), name, 0) for name, wait in waits)
            return await Fake(client, 8, means=("sessions",), longest_wait=30.0).ask(Talk("t", "", (), tasks=tasks))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert asyncio.run(played()).seconds == 30
    _, own, _, theirs, waited, again, *ended = told
    assert (own, waited, ended) == (again, 20, [("closed", theirs), ("closed", own)])
    assert own != theirs


def test_options_of_other_runs_are_not_passed_over() -> None:
    for wrong, named in (
        (["--recorded", "log.jsonl", "--prompts", "p.jsonl", "--per-category", "2"], "--prompts, --per-category"),
        (["--recorded", "log.jsonl", "--concurrency", "2"], "--concurrency"),
        (["--agents", "2", "--kv-share", "0.5"], "--agents, --kv-share"),
        (["--recorded", "log.jsonl", "--kv-share", "inf"], "--kv-share inf: give a number"),
        (["--recorded", "log.jsonl", "--server-args", "--tp two"], "--server-args --tp two: give a whole number"),
    ):
        said = CliRunner().invoke(app, ["bench", *wrong])
        assert isinstance(said.exception, ConfigError)
        assert named in str(said.exception)
