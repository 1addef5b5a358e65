import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from whiflash_lab.bench.prompts import digest_of, load_prompts, prompt_of, sample, shipped
from whiflash_sglang.errors import ConfigError

MESSAGES = [{"role": "user", "content": "Hello"}]


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_the_shipped_sample() -> None:
    prompts = load_prompts(str(shipped()))
    categories = [prompt.category for prompt in prompts]
    wanted = {"agent", "chat", "code", "json", "math", "summarisation", "tool_call"}
    assert set(categories) == wanted
    assert {categories.count(category) for category in wanted} == {6}
    rows = [json.loads(line) for line in shipped().read_text(encoding="utf-8").strip().split("\n")]
    assert all(row["license"] and row["source"] for row in rows)
    requests = {prompt.category: prompt.request() for prompt in prompts}
    assert requests["tool_call"]["tool_choice"] == "required"
    assert requests["tool_call"]["tools"]
    assert requests["json"]["response_format"]["type"] == "json_schema"
    assert set(requests["chat"]) == {"messages"}


def test_spec_bench_and_speed_bench_rows(tmp_path: Path) -> None:
    spec = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."], "reference": []}
    speed = {"question_id": "q-7", "category": "coding", "sub_category": "x", "turns": ["Code."], "multiturn": False}
    first, second = load_prompts(write(tmp_path / "rows.jsonl", spec, speed))
    assert load_prompts(write(tmp_path / "list.json", [spec, speed])) == [first, second]
    assert (first.id, first.category, first.follow_ups) == ("81", "writing", ("Rewrite.",))
    assert (second.id, second.messages) == ("q-7", ({"role": "user", "content": "Code."},))
    turn = first.next_turn("Written.")
    assert turn is not None
    assert turn.id == "81#2"
    assert [m["role"] for m in turn.messages] == ["user", "assistant", "user"]
    assert [m["content"] for m in turn.messages] == ["Write.", "Written.", "Rewrite."]
    assert turn.next_turn("RoundResult.") is None
    for name, last in (("p", "p#3"), ("c#-x", "c#-x#3")):
        third = prompt_of({"id": name, "turns": ["a", "b", "c"]}, "here")
        for _ in range(2):
            third = third.next_turn("x") or third
        assert third.id == last


def test_logs_of_pairs_and_of_responses_are_read(tmp_path: Path) -> None:
    chat = {"request": {"messages": MESSAGES, "temperature": 0.6}, "response": {"choices": []}, "id": "a"}
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
    called = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "summary": []},
        *({"type": "function_call", "call_id": n, "name": "look", "arguments": "{}"} for n in "xy"),
        {"type": "function_call_output", "call_id": "x", "output": "seen"},
    ]
    form = {"format": {"type": "json_schema", "name": "f", "schema": {}}}
    body = {"input": called, "instructions": "Be brief.", "tools": [tool, {"type": "web_search"}], "text": form}
    named = {**body, "tool_choice": {"type": "function", "name": "look"}}
    pair, text, whole = load_prompts(
        write(tmp_path / "log.jsonl", chat, {"input": "Hello"}, {"body": json.dumps(named), "response": {}})
    )
    assert (pair.id, pair.messages, pair.fields) == ("a", tuple(MESSAGES), {"temperature": 0.6})
    assert text.messages == tuple(MESSAGES)
    assert [message["role"] for message in whole.messages] == ["system", "user", "assistant", "tool"]
    assert [call["id"] for call in whole.messages[2]["tool_calls"]] == ["x", "y"]
    assert [each["function"]["name"] for each in whole.fields["tools"]] == ["look"]
    assert whole.fields["tool_choice"]["function"] == {"name": "look"}
    assert whole.fields["response_format"]["json_schema"] == {"name": "f", "schema": {}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a row is a JSON object"),
        ({"id": 1}, "neither 'messages' nor 'input' nor 'turns'"),
        ({"input": [{"type": "computer_call"}]}, "an item of type 'computer_call'"),
        ({"input": [{"role": "user"}]}, "not as /v1/responses takes it: KeyError\\('content'\\)"),
        ({"turns": "Hello"}, "list of strings"),
        ({"messages": MESSAGES, "turns": 3}, "list of strings"),
        ({"messages": 5}, "'messages' must be a list"),
        ({"input": "Hello", "text": {"format": "json"}}, "not as /v1/responses takes it"),
        ({"turns": ["\ud800"]}, "a lone surrogate"),
        ({"messages": MESSAGES, "category": "\ud800"}, "a lone surrogate"),
        ({"messages": ["Hello"]}, "an object with a 'role'"),
        ({"messages": MESSAGES, "temperature": "0.6"}, "'temperature' is '0.6': give a number"),
        ({"turns": ["Hello"], "top_p": True}, "'top_p' is True: give a number"),
    ],
)
def test_wrong_rows_are_named(row: object, message: str, tmp_path: Path) -> None:
    good = {"messages": MESSAGES}
    with pytest.raises(ConfigError, match=f"row 2: .*{message}"):
        load_prompts(write(tmp_path / "rows.jsonl", good, row))


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_prompts("nothing.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"messages": [}\n')
    with pytest.raises(ConfigError, match=r"broken.jsonl, line 1: not JSON"):
        load_prompts(str(tmp_path / "broken.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds no prompts"):
        load_prompts(str(tmp_path / "empty.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match=r"pipe.jsonl cannot be read: no regular file"):
        load_prompts(str(tmp_path / "pipe.jsonl"))


def test_sample_takes_turns_between_categories(tmp_path: Path) -> None:
    """Rows without an id may be equal."""
    rows = [{"id": f"{c}{i}", "category": c, "messages": MESSAGES} for c in "ab" for i in range(3)]
    prompts = [prompt_of(row, "here") for row in rows]
    assert [p.id for p in sample(prompts, 2)] == ["a0", "b0", "a1", "b1"]
    assert len(sample(prompts, None)) == 6
    logged = {"id": None, "category": None, "messages": MESSAGES}
    twice = sample(load_prompts(write(tmp_path / "log.jsonl", logged, {"messages": MESSAGES}, *rows)), None)
    assert [p.id for p in twice if p.category == "chat"] == ["row 1", "row 2"]
    with pytest.raises(ConfigError, match="id 'a0'"):
        sample([*prompts, prompts[0]], None)
    with pytest.raises(ConfigError, match="id 'a#2'"):
        sample([replace(prompts[0], id="a#1", follow_ups=("so?",)), replace(prompts[1], id="a#2")], None)


def test_a_body_s_own_fields_are_sent() -> None:
    """Those that say how an answer is drawn, too; others, such as the model's name, are not."""
    tool = {"type": "function", "function": {"name": "here", "parameters": {}}}
    drawn = {"temperature": 0.6, "top_p": 0.95}
    body = {"id": "a", "messages": MESSAGES, "tools": [tool], "tool_choice": "auto", **drawn}
    prompt = prompt_of({**body, "model": "m", "stream": True}, "here")
    assert prompt.request() == {key: value for key, value in body.items() if key != "id"}
    assert (prompt.sampling, prompt_of({**body, "temperature": 0}, "here").sampling) == (drawn, {})
    asked = [prompt_of({**body, key: value}, "") for key, value in (("temperature", 1), ("tool_choice", {}))]
    assert len({digest_of([prompt]) for prompt in (prompt, *asked)}) == 3
    assert asked[0].seed == prompt.seed != prompt_of({**body, "id": "b"}, "").seed


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_rows_of_published_sets_lose_nothing(tmp_path: Path) -> None:
    """Each row has an id, also in a file whose last line has no end; calls and types stay what they are."""
    sets = Path(__file__).parents[3] / "results" / "benchmark"

    def rows(*command: object) -> list[Any]:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    for year in ("24", "25"):
        write(tmp_path / f"aime{year}.jsonl", {"problem": "1 + 1?"}, {"turns": ["2 + 2?"]})
    first, second, *_ = asked = rows(sets / "prompt-sets.sh", "aime", tmp_path)
    assert [row["id"] for row in asked] == ["aime24-1", "aime24-2", "aime25-1", "aime25-2"]
    assert (first["turns"][0].startswith("1 + 1?\nPlease reason"), second["turns"]) == (True, ["2 + 2?"])
    calling = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}], "reasoning_content": "why"}
    answered = {"role": "tool", "content": "done", "tool_call_id": "c"}
    said = {"role": "assistant", "content": "so"}
    listed = {"role": "tool", "content": "done", "tool_call_ids": ["c"], "agent": "main"}
    history = [{**MESSAGES[0], "tool_calls": None}, calling, answered, calling, listed, said, said]
    (tmp_path / "one.traj").write_text(json.dumps({"history": history}))
    (row,) = rows(sets / "prompt-sets.sh", "swe-agent", tmp_path)
    assert row["messages"] == [MESSAGES[0], calling, answered, calling, answered]
    parameters = {"type": "dict", "properties": {"s": {"type": "Stack"}, "o": {"type": "any"}}}
    function = {"name": "a.b", "description": "", "parameters": parameters}
    write(tmp_path / "q.json", {"id": "simple_1", "question": [MESSAGES], "function": [function]})
    (row,) = rows("jq", "-c", "--argjson", "docs", "[]", "-f", sets / "bfcl.jq", tmp_path / "q.json")
    typed = row["tools"][0]["function"]["parameters"]
    assert typed == {"type": "object", "properties": {"s": {"type": "array"}, "o": {"type": "string"}}}
