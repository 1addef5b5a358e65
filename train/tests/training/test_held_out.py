"""A training prompt shares no user, conversation, tool or schema with an evaluation prompt."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import UsageError
from whiflash_train.answers.prompts import UNNAMED, split


def turns(*texts: str, source: str = "agents", **fields: Any) -> dict[str, Any]:
    """A conversation whose user says `texts`, each answered but the last."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind to mia_li_0000."}]
    for text in texts:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes?"}]
    return {"id": texts[-1] + source, "source": source, "messages": messages[:-1], **fields}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def kept(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in split(train, held_out).kept]


def test_a_users_other_conversations_go_too() -> None:
    """The opening turn of one of them names nobody; its later turn does."""
    train = [
        turns("Hi, change my flight."),
        turns("Hi, change my flight.", "I am mia_li_3668."),
        turns("Cancel it.", "It is ivan_muller_7015."),
    ]
    done = split(train, [turns("Book me a seat.", "mia_li_3668")])
    assert [row["messages"][1]["content"] for row in done.kept] == ["Cancel it."]
    assert done.dropped == Counter({("agents", "conversation"): 1, ("agents", "user"): 1})


def test_who_is_never_named_may_be_anybody() -> None:
    done = split([turns("Hello."), turns("Hello.", source="chats")], [turns("Book.", "mia_li_3668")])
    assert [row["source"] for row in done.kept] == ["chats"]
    assert done.dropped == Counter({("agents", UNNAMED): 1})


def test_the_same_words_in_other_spacing_are_the_same_conversation() -> None:
    asked, again = turns("What  is\nTWO plus two?", source="a"), turns("what is two plus two?", source="b")
    assert kept([asked], [again]) == []


def test_tools_and_schemas_are_documents() -> None:
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    train = [
        turns("Weather?", tools=[tool("weather")], source="a"),
        turns("Time?", tools=[tool("time")], source="a"),
        turns("Any object.", response_format=schema, source="a"),
        turns("One.", "Two.", tools=[tool("weather")], source="a"),
    ]
    done = split(train, [turns("Rain?", tools=[tool("weather")], source="b"), turns("Object.", response_format=schema)])
    assert [row["id"] for row in done.kept] == ["Time?a", "Two.a"]
    assert done.dropped == Counter({("a", "tool"): 1, ("a", "schema"): 1})


def test_what_a_dropped_prompt_shares_with_others_is_not_passed_on() -> None:
    """But for users and conversations: two tools in one prompt do not make them one document."""
    train = [
        turns("Both?", tools=[tool("weather"), tool("time")], source="a"),
        turns("Time?", tools=[tool("time")], source="a"),
    ]
    assert kept(train, [turns("Rain?", tools=[tool("weather")], source="b")]) == ["Time?a"]


def test_the_command_writes_what_is_kept_and_says_what_is_not(tmp_path: Path) -> None:
    train, held_out, out = (tmp_path / name for name in ("train.jsonl", "held_out.jsonl", "kept.jsonl"))
    rows = [turns("A.", "mia_li_3668"), turns("B.\u2028", "ivan_muller_7015", note="\ud800")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    train.write_text(lines.replace("\ud800", "\\ud800"), encoding="utf-8")
    held_out.write_text(json.dumps(turns("C.", "mia_li_3668")) + "\n")
    command = ["lab", "split", str(train), str(held_out), str(out), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "training prompts": 2,
        "held-out prompts": 1,
        "kept": 1,
        "dropped": 1,
        "dropped, agents, user": 1,
    }
    [left] = [json.loads(line) for line in out.read_text(encoding="utf-8").strip().split("\n")]
    assert {key: left[key] for key in rows[1]} == rows[1]
    assert isinstance(CliRunner().invoke(app, [*command, "--users", "("]).exception, UsageError)
    again = CliRunner().invoke(app, ["lab", "split", str(out), str(held_out), str(out), "--json"])
    assert json.loads(again.stdout)["dropped"] == 0
