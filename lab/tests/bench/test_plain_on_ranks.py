"""Whose answers an arm on several ranks is compared with."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from rich.progress import Progress

from whiflash_lab.bench import reference, runner
from whiflash_lab.bench.arms import Subject, build_arms
from whiflash_lab.bench.cells import Answer, Cell, Journal, Load
from whiflash_lab.bench.load import RefusedError
from whiflash_lab.bench.prompts import Prompt
from whiflash_lab.bench.reference import Reference, differences, plain_of
from whiflash_sglang.errors import WhiflashError

ALONE = Load(value=1)


def test_ranks_are_compared_with_plain_decoding_on_as_many() -> None:
    """Answers on one device replace those that nobody asked for."""
    references = {
        "none": {"p": Reference(Prompt("p", "chat", ()), (1,), (5, 6), (9.0, 9.0), "")},
        "none@tp2": {"p": Reference(Prompt("p", "chat", ()), (1,), (5, 7), (9.0, 9.0), "")},
    }
    arms = ("auto", "auto@dp2", "auto@tp2", "none@tp2", "auto@tp2@beside", "auto@tp3")
    cells = [
        Cell(
            load=ALONE,
            arm=arm,
            repetition=0,
            seconds=1,
            answers=(Answer(prompt="p", seconds=1, ttft=0.1, tokens=(5, 7), forwards=1),),
        )
        for arm in arms
    ]
    found = differences(cells, references, lambda reference, position: 1.0, "float32")
    assert [d.arm for d in found] == ["auto", "auto@dp2", "auto@tp3"]
    assert [plain_of(arm) for arm in arms] == ["none", "none", *["none@tp2"] * 3, "none@tp3"]


def test_plain_decoding_on_ranks_answers_what_plain_decoding_was_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Follow-ups are asked after the answers of `none`, of all arms."""
    subject = Subject(target=tmp_path, bundle=tmp_path, eagle3=tmp_path, dflash=tmp_path, dtype="float32")
    arms = tuple(build_arms(["none", "auto", "none@dp2", "none@tp2", "auto@tp2"], subject))
    prompts = (Prompt("p", "chat", ({"role": "user", "content": "?"},), follow_ups=("and?",)),)
    asked: list[tuple[Any, str]] = []

    def answering(client: Any, prompt: Prompt, max_tokens: int, sampling: object) -> Reference:
        asked.append((client, prompt.messages[-1]["content"]))
        return Reference(prompt, (1,), (5,), (9.0,), f"by {client}")

    monkeypatch.setattr(runner, "ask_reference", answering)
    monkeypatch.setattr(runner, "flush", lambda client: None)
    fleet = SimpleNamespace(clients={arm.server: arm.server for arm in arms})
    plan = runner.Plan(subject, arms, prompts)
    running = runner.Runner(plan, fleet, Journal(tmp_path / "cells", "plan"), Progress(disable=True))
    running._ask_references()
    for arm in arms:
        running._ask_apart(arm.name)
    assert asked == [(name, text) for name in ("none", "none@tp2") for text in ("?", "and?")]
    assert {name: len(own) for name, own in running._apart.items()} == {"none@tp2": 2}
    [_, later] = running._apart["none@tp2"].values()
    assert "by none" in [message["content"] for message in later.prompt.messages]


def test_a_prompt_that_the_server_does_not_take_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answering(client: Any, prompt: Prompt, max_tokens: int, sampling: object) -> Reference:
        if prompt.id == "long":
            raise RefusedError("prompt long: longer than the context")
        return Reference(prompt, (1,), (5,), (9.0,), "short")

    monkeypatch.setattr(runner, "ask_reference", answering)
    monkeypatch.setattr(runner, "flush", lambda client: None)
    subject = Subject(target=tmp_path, bundle=tmp_path, eagle3=None, dflash=None, dtype="float32")
    prompts = tuple(Prompt(name, "chat", ({"role": "user", "content": "?"},)) for name in ("long", "fits"))
    fleet, journal = SimpleNamespace(clients={"none": "none"}), Journal(tmp_path / "cells", "plan")
    plan = runner.Plan(subject, tuple(build_arms(["none"], subject)), prompts)
    running = runner.Runner(plan, fleet, journal, Progress(disable=True))
    running._ask_references()
    assert list(running._references) == ["fits"]
    assert running.left_out == {"long": "prompt long: longer than the context"}
    nothing = runner.Runner(replace(plan, prompts=prompts[:1]), fleet, journal, Progress(disable=True))
    with pytest.raises(WhiflashError, match="took no prompt: prompt long"):
        nothing._ask_references()
    refusing = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(400)), base_url="http://x")
    monkeypatch.undo()
    with pytest.raises(RefusedError, match="prompt fits"):
        reference.ask_reference(refusing, prompts[1], 8)
