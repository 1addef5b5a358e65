"""Sets that others report on: their files as published, cut down to a row or two."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from whiflash_lab.bench import prompts
from whiflash_lab.bench.prompts import GROUPS, MT_BENCH, SUITES, read_suites, sample, suites_of
from whiflash_sglang.errors import ConfigError, UsageError

TURNS = {"turns": ["Write.", "Rewrite."]}
MAIL = {"name": "send", "description": "Send.", "parameters": {"type": "dict", "properties": {}}}


def write(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def test_spec_bench_has_six_sub_tasks(tmp_path: Path) -> None:
    single = ("translation", "summarization", "qa", "math_reasoning", "rag")
    rows = [{"question_id": i, "category": c, **TURNS} for i, c in enumerate(MT_BENCH)]
    rows += [{"question_id": 90 + i, "category": c, "turns": ["Do."]} for i, c in enumerate(single)]
    write(tmp_path / "question.jsonl", *rows)
    found = read_suites(["spec-bench"], tmp_path)
    assert {prompt.category for prompt in found} == {"multi-turn", *single}
    assert all(prompt.follow_ups == ("Rewrite.",) for prompt in found if prompt.category == "multi-turn")


def test_the_nine_sets_of_deepspec(tmp_path: Path) -> None:
    nine = suites_of("deepspec,gsm8k")
    assert len(nine) == 9
    for name in nine:
        write(tmp_path / SUITES[name].files.replace("*", "4"), TURNS)
    write(tmp_path / "aime25.jsonl", {"problem": "1 + 1?", "answer": "2"})
    found = read_suites(nine, tmp_path)
    assert {prompt.category for prompt in found} == set(nine)
    assert len(found) == 10
    (ours,) = [prompt for prompt in found if prompt.id == "aime25-1"]
    assert ours.messages[0]["content"].startswith("1 + 1?\nPlease reason step by step")
    assert ours.messages[0]["content"].endswith("\\boxed{}.")
    sample(found, None)  # ids differ


def test_instructions_are_asked_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "input_data.jsonl", {"key": 1000, "prompt": "Use no commas.", "kwargs": [{}]})
    (prompt,) = read_suites(["ifeval"], tmp_path)
    assert (prompt.category, prompt.messages[0]["content"]) == ("ifeval", "Use no commas.")


def test_bfcl_has_parallel_calls_and_turns(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "Play both."}]
    nested = {"songs": {"type": "tuple", "items": {"type": "float"}}, "type": {"type": "String"}}
    play = {
        "name": "radio.play",
        "parameters": {"type": "dict", "properties": nested},
        "response": {"type": "dict"},
    }
    write(
        tmp_path / "BFCL_v4_parallel.json",
        {"id": "parallel_0", "question": [ask], "function": [{**play, "description": "Plays."}]},
    )
    write(tmp_path / "multi_turn_func_doc" / "message_api.json", MAIL, {**MAIL, "name": "hidden"})
    turns = [ask, [], [{"role": "user", "content": "And now?"}]]
    write(
        tmp_path / "BFCL_v4_multi_turn_base.json",
        {"id": "multi_turn_base_0", "question": turns, "involved_classes": ["MessageAPI"]}
        | {"excluded_function": ["hidden"]},
    )
    write(tmp_path / "BFCL_v4_irrelevance.json", {"id": "no call is due"})
    talk, both = read_suites(["bfcl"], tmp_path)
    assert (talk.category, both.category) == ("multi_turn_base", "parallel")
    assert [tool["function"]["name"] for tool in talk.tools] == ["send"]
    function = both.tools[0]["function"]
    assert (function["name"], "response" in function) == ("radio_play", False)
    assert function["parameters"] == {
        "type": "object",
        "properties": {"songs": {"type": "array", "items": {"type": "number"}}, "type": {"type": "string"}},
    }
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": "{}"}}
    later = talk.next_turn("", [call])
    assert later is not None
    assert [message.get("tool_calls") for message in later.messages] == [None, [call], None]
    assert later.messages[-1]["content"] == "And now?"


def test_a_wheel_is_read_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--suite bfcl needs --suite-dir .*bfcl-eval.*Apache-2.0"):
        read_suites(["bfcl"], None)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "__init__.py").touch()
    write(
        tmp_path / "there" / "data" / "BFCL_v4_multiple.json",
        {"id": "multiple_0", "question": [[{"role": "user", "content": "Mail."}]], "function": [MAIL]},
    )
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SUITES, "bfcl", replace(SUITES["bfcl"], wheel="there"))
    assert [prompt.id for prompt in read_suites(["bfcl"], None)] == ["multiple_0"]


def test_recorded_agents_are_asked_in_the_middle(tmp_path: Path) -> None:
    said = [{"role": role, "content": str(i)} for i, role in enumerate(("user", "assistant") * 3)]
    write(tmp_path / "ctf" / "rock.traj", {"history": said})
    (demonstration,) = read_suites(["swe-agent"], tmp_path)
    assert demonstration.id == "ctf/rock-1"
    record = {"info": {"environment_info": {"domain_name": "retail"}}, "simulations": [{"messages": said}]}
    write(tmp_path / "trajectories" / "run.json", record)
    (prompt,) = read_suites(["tau2"], tmp_path)
    assert prompt.category == "tau2 retail"
    assert [message["content"] for message in prompt.messages] == ["0", "1", "2"]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'gsm9k' is not one of spec-bench, gsm8k"):
        suites_of("gsm9k")
    with pytest.raises(UsageError, match=r"--suite gsm8k needs --suite-dir .*DeepSpec \(MIT\)"):
        read_suites(["gsm8k"], None)
    with pytest.raises(ConfigError, match=r"--suite gsm8k: no gsm8k\.jsonl in .*DeepSpec"):
        read_suites(["gsm8k"], tmp_path)
    write(tmp_path / "gsm8k.jsonl", TURNS, {"problem": "another set's"})
    with pytest.raises(ConfigError, match=r"gsm8k\.jsonl, row 2: neither 'turns' nor 'question'"):
        read_suites(["gsm8k"], tmp_path)
    write(tmp_path / "BFCL_v4_multiple.json", {"id": "multiple_0", "question": [[]]})
    with pytest.raises(ConfigError, match=r"multiple\.json, row 1: no question with functions"):
        read_suites(["bfcl"], tmp_path)


def test_the_command_takes_one_source_of_prompts() -> None:
    from whiflash_sglang.cli.app import app

    done = CliRunner().invoke(app, ["bench", "--suite", "gsm8k", "--prompts", "x.jsonl"])
    assert done.exit_code != 0
    assert "both name the prompts" in str(done.exception or done.output)
    assert set(GROUPS) == {"deepspec"}
