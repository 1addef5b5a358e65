"""Every format that is read, and what is said of files that are not what they seem."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whiflash_lab import conversations as bounds
from whiflash_lab.conversations import Conversation, read_recorded
from whiflash_sglang.errors import ConfigError

ASK = {"role": "user", "content": "Which flights do I have?"}
FOUND = {"name": "find", "arguments": '{"user": "mia_li_3668"}'}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": FOUND}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "find", "content": '{"flight": "HAT136"}'}
ANSWER = {"role": "assistant", "content": "You are on flight HAT136."}
MESSAGES = [ASK, CALL, RESULT, ANSWER]
PARAMETERS = {"type": "object", "properties": {"user": {"type": "string"}}, "required": ["user"]}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": PARAMETERS}}]


FORMATS: dict[str, Any] = {
    "log": {"id": "one", "category": "support", "messages": MESSAGES, "tools": TOOLS},
    "request": {
        "request": {"model": "m", "messages": MESSAGES[:3], "tools": TOOLS},
        "response": {"choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}]},
    },
    "tau2": {
        "info": {"environment_info": {"domain_name": "airline", "policy": "Be kind.", "tool_defs": None}},
        "tasks": [],
        "simulations": [
            {
                "task_id": "3",
                "trial": 1,
                "messages": [
                    {**ASK, "tool_calls": None, "turn_idx": 0},
                    {"role": "user", "content": None, "tool_calls": [{"name": "look", "requestor": "user"}]},
                    {"id": "u1", "role": "tool", "content": "seen", "requestor": "user"},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "c1", "name": "find", "arguments": {"user": "mia_li_3668"}}],
                    },
                    {"id": "c1", "role": "tool", "content": RESULT["content"], "requestor": "assistant"},
                    {**ANSWER, "tool_calls": None},
                ],
            }
        ],
    },
    "swe-agent": {
        "environment": "main",
        "trajectory": [],
        "history": [
            {**ASK, "agent": "main"},
            {**CALL, "agent": "main", "thought": "", "action": "find mia_li_3668"},
            {"role": "tool", "content": [{"type": "text", "text": RESULT["content"]}], "tool_call_ids": ["c1"]},
            {**ANSWER, "agent": "main", "thought": "", "action": ""},
        ],
        "info": {"exit_status": "submitted"},
    },
    "tau-bench": {"task_id": 3, "trial": 1, "reward": 1.0, "info": {}, "traj": MESSAGES},
    "mini-swe-agent": {
        "info": {"exit_status": "Submitted"},
        "messages": [*MESSAGES, {"role": "exit", "content": "", "extra": {}}],
        "trajectory_format": "mini-swe-agent-1.1",
        "instance_id": "repository__repository-1",
    },
}
"""Each holds the question, the call, its result and the answer."""
CALLS = [
    {"timestamp": 7_000_000, "input": "Ask.\n\nThree lines.", "output": "Done."},
    {"timestamp": 1_000_000, "input": "Ask.", "output": "Count it."},
    {"timestamp": 2_500_000, "input": "You count.", "output": "Three?"},
    {"timestamp": 4_500_000, "input": "You count.\n\nassistant: Three?\n\nSure?", "output": "Three."},
]
"""Two conversations of one LMCache session; the first one's inputs leave answers out."""
TRACE = {
    "metadata": {},
    "conversations": [[{"messages": [ASK], "prompt_tokens": 9}, {"messages": [RESULT]}], [{"messages": []}]],
}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str, name: str = "recorded.json") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return written


def said(recorded: Conversation) -> list[tuple[str, str, str]]:
    """Role, content and called functions of every message but a system message."""
    rows = []
    for message in recorded.messages:
        calls = [call["function"] for call in message.get("tool_calls", [])]
        called = " ".join(f"{call['name']} {call['arguments']}" for call in calls)
        rows.append((message["role"], message["content"], called))
    return [row for row in rows if row[0] != "system"]


SAID = [
    ("user", ASK["content"], ""),
    ("assistant", "", 'find {"user": "mia_li_3668"}'),
    ("tool", RESULT["content"], ""),
    ("assistant", ANSWER["content"], ""),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["one", "list", "lines", "pretty"])
def test_every_format_in_every_layout(write: Write, name: str, layout: str) -> None:
    record = FORMATS[name]
    text = {
        "one": json.dumps(record),
        "list": json.dumps([record, record]),
        "lines": json.dumps(record) + "\n\n" + json.dumps(record) + "\n",
        "pretty": json.dumps(record, indent=2),
    }[layout]
    found = read_recorded(write(text))
    assert len(found) == (2 if layout in ("list", "lines") else 1)
    for recorded in found:
        assert said(recorded) == SAID
        assert recorded.tools == (tuple(TOOLS) if name in ("log", "request") else ())


def test_names_and_categories(write: Write) -> None:
    found = {name: read_recorded(write(json.dumps(FORMATS[name])))[0] for name in FORMATS}
    assert (found["log"].id, found["log"].category) == ("one", "support")
    assert found["tau2"].id == "recorded/task 3 trial 1"
    assert found["tau2"].messages[0]["content"] == "Be kind."
    assert found["mini-swe-agent"].id == found["mini-swe-agent"].task == "repository__repository-1"
    assert (found["tau-bench"].task, found["log"].task) == ("tau-bench task 3", "")
    assert {one.category for one in found.values()} == {"support", "log", "tau2 airline", "SWE-agent", "tau-bench"}
    (bare,) = read_recorded(write(json.dumps(MESSAGES)))
    assert said(bare) == SAID


def test_calls_of_a_session_become_conversations(write: Write) -> None:
    """In the order of time; the conversation that opens later is a subagent of the first."""
    lines = [json.dumps({**call, "session_id": "s"}) for call in CALLS]
    first, second = read_recorded(write("\n".join(lines), "calls.jsonl"))
    assert [m["content"] for m in first.messages] == ["Ask.", "Count it.", "\n\nThree lines.", "Done."]
    assert [m["content"] for m in second.messages] == ["You count.", "Three?", "\n\nSure?", "Three."]
    assert (first.id, first.parent, second.parent) == ("s", None, ("s", 1))
    assert (first.waits, second.waits) == ((0.0, 6.0), (0.0, 2.0))


def test_a_trace_without_answers(write: Write) -> None:
    (recorded,) = read_recorded(write(json.dumps(TRACE)))
    assert [(m["role"], m.get("tokens")) for m in recorded.messages] == [
        ("user", None),
        ("assistant", 220),
        ("tool", None),
        ("assistant", 220),
    ]


def test_times_of_tools(write: Write) -> None:
    """Between an answer and the last message before the next; what is not recorded is 0."""
    begin, end = "2026-11-29T10:00:00", "2026-11-29T10:00:04.5"
    logged = [ASK, {**CALL, "timestamp": begin}, {**RESULT, "timestamp": end}, ANSWER, ASK, ANSWER]
    mini = [ASK, {**CALL, "extra": {"timestamp": 10.0}}, {**RESULT, "extra": {"timestamp": 13.0}}, ANSWER]
    ran = [{"execution_time": 2.5}, {"execution_time": 9.0}]
    for record, waits in (
        ({"messages": logged}, (0.0, 4.5, 0.0)),
        ({**FORMATS["mini-swe-agent"], "messages": mini}, (0.0, 3.0)),
        ({**FORMATS["swe-agent"], "trajectory": ran}, (0.0, 2.5)),
        ({**FORMATS["swe-agent"], "trajectory": ran[:1]}, (0.0, 0.0)),
    ):
        assert read_recorded(write(json.dumps(record)))[0].waits == waits


BAD: list[tuple[str, Any, str]] = [
    ("no json", "{", r"recorded\.json: not JSON"),
    ("the line", '{"messages": []}\n{"messages": [}', r"recorded\.json, line 2: not JSON"),
    ("the line of a document", '{\n "messages": [,]}', r"recorded\.json, line 2: not JSON"),
    ("no format", '{"rows": []}', r"recorded\.json: of no known format \(OpenAI messages"),
    ("the record", '[{"messages": []}, 7]', r"recorded\.json, record 1: of no known format"),
    ("nothing", "", r"recorded\.json: not JSON"),
    ("no answer", {"messages": [ASK]}, r"recorded\.json: holds no recorded answer"),
    ("role", {"messages": [{"role": "robot"}]}, r"messages\[0\]\.role: 'robot' is not one of"),
    ("no message", {"messages": ["hello"]}, r"messages\[0\]: must be an object, not str"),
    ("content", {"messages": [{"role": "user", "content": 7}]}, r"messages\[0\]\.content: must be text"),
    (
        "an image",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        r"messages\[0\]\.content\[0\]\.type: 'image_url' is not text",
    ),
    (
        "a lone surrogate",
        {"messages": [{"role": "user", "content": "\ud800"}]},
        r"messages\[0\]\.content: holds a lone surrogate",
    ),
    (
        "a call without a function",
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        r"messages\[0\]\.tool_calls\[0\]\.function: must be an object",
    ),
    (
        "arguments",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 7}}]}]},
        r"tool_calls\[0\]\.function\.arguments: must be text",
    ),
    ("tools", {"messages": MESSAGES, "tools": [{"function": {}}]}, r"tools\[0\]\.function\.name: is missing"),
    ("messages", {"messages": "x"}, r"messages: must be a list, not str"),
    (
        "a prediction",
        {"messages": MESSAGES, "prediction": {"type": "content", "content": 3}},
        r"prediction\.content: must be a string",
    ),
    ("a simulation", {"info": {}, "simulations": [7]}, r"simulations\[0\]: must be an object"),
    ("choices", {"request": {"messages": []}, "response": {"choices": []}}, r"response\.choices\[0\]: must be"),
    (
        "a message of a trajectory",
        {"history": [{"role": "user", "content": "a"}, {"role": "tool", "content": 7}]},
        r"messages\[1\]\.content: must be text",
    ),
    ("depth", "[" * 100_000, r"recorded\.json: (nested too deeply|not JSON)"),
    ("digits", '{"messages": [], "id": ' + "9" * 5000 + "}", r"recorded\.json: not JSON"),
]


@pytest.mark.parametrize(("what", "content", "message"), BAD, ids=[row[0] for row in BAD])
def test_what_is_wrong_is_named(write: Write, what: str, content: Any, message: str) -> None:
    path = write(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_recorded(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        read_recorded(tmp_path / "nowhere.json")
    (tmp_path / "latin.json").write_bytes(b'"\xff"')
    with pytest.raises(ConfigError, match=r"latin\.json cannot be read"):
        read_recorded(tmp_path / "latin.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match=r"pipe\.json cannot be read: no regular file"):
        read_recorded(tmp_path / "pipe.json")


def test_bounds(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_MESSAGES", 3)
    path = write(json.dumps(FORMATS["log"]))
    with pytest.raises(ConfigError, match="4 messages; at most 3"):
        read_recorded(path)
    monkeypatch.setattr(bounds, "MAX_MESSAGES", 4)
    monkeypatch.setattr(bounds, "MAX_CHARS", 100)
    with pytest.raises(ConfigError, match="characters; at most 100"):
        read_recorded(path)
    monkeypatch.setattr(bounds, "MAX_BYTES", 10)
    with pytest.raises(ConfigError, match="bytes; at most 10"):
        read_recorded(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damage_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any part replaced by anything: a conversation that renders, or an error that names the file; nothing else."""
    whole = {**FORMATS, "calls": [{**call, "session_id": "s"} for call in CALLS], "trace": TRACE}
    record = json.loads(json.dumps(whole[data.draw(st.sampled_from(sorted(whole)))]))
    *way, last = data.draw(st.sampled_from(places(record)[1:]))
    inside = record
    for key in way:
        inside = inside[key]
    inside[last] = data.draw(JSON)
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    text = json.dumps(record)
    path.write_text(text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text)
    found, refused = [], "damaged.json"
    try:
        found = read_recorded(path)
    except ConfigError as error:
        refused = str(error)
    assert "damaged.json" in refused
    for recorded in found:
        assert recorded.answers
        for message in recorded.messages:
            assert isinstance(message["content"], str)
            assert all(isinstance(call["function"]["arguments"], str) for call in message.get("tool_calls", []))
