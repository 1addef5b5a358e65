"""`Session`: salt and agent of every request, and the file that an edit is likely to write."""

import asyncio
import json
import sys
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any

import anyio
import pytest
from fake_server import CAPABILITIES, ROUTES, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Session, agent, http_client, predict, spans, wrap
from whiflash_sdk.edits import file_shown, file_to_edit

session: Any = sys.modules["whiflash_sdk.session"]
FILE = 'def area(r):\n\treturn 3.14 * r * r  # "é"\n'
NUMBERED = "".join(f"{number:6}\t{line}\n" for number, line in enumerate(FILE.splitlines(), 1))
NONE: Any = {"type": "object", "properties": {}}
READ, EDIT = (
    {"type": "function", "function": {"name": name, "parameters": NONE}} for name in ("read_file", "edit_file")
)
CHANGE = {"path": "a.py", "old_string": "3.14", "new_string": "pi"}


def call(number: int, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": "f", "arguments": text}
    return {"role": "assistant", "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}]}


def user(text: str = "Do it.") -> dict[str, Any]:
    return {"role": "user", "content": text}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


def of_messages(used: Any, **result: Any) -> list[dict[str, Any]]:
    """A call and its result, as Messages has them."""
    use = {"type": "tool_use", "id": "c", "name": "Read", "input": used}
    shown = {"type": "tool_result", "tool_use_id": "c", **result}
    return [{"role": "assistant", "content": [use]}, {"role": "user", "content": [shown]}]


NESTED = "[" * 3000 + "]" * 3000
OPENED = "[File: a.py (1 lines total)]\n"
CHAT = [user(), call(1, {"path": "a.py"}), result(1, NUMBERED)]
OF_MESSAGES = [user(), *of_messages({"file_path": "a"}, content=[{"text": NUMBERED}])]
OF_RESPONSES: Any = [
    user(),
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"path": "a"}'},
    {"type": "function_call_output", "call_id": "c", "output": FILE},
]


def predicted(body: dict[str, Any]) -> str | None:
    sent = body.get("prediction")
    return None if sent is None else json.loads(f'"{sent["content"]}"')


@pytest.fixture
def wrapped(client: OpenAI, server: FakeServer) -> OpenAI:
    server.capabilities = {**CAPABILITIES, "routes": ROUTES}
    return wrap(client, agent="client", tenant="client")


def test_every_request_carries_who_asks(wrapped: OpenAI, server: FakeServer) -> None:
    with pytest.raises(ValueError, match="tenant"):
        Session(tenant="")
    create = wrapped.chat.completions.create
    with Session(tenant="acme", agent="coder"):
        create(model="m", messages=[user()])
        with agent("inner"), Session(task="t"):
            create(model="m", messages=CHAT)
        wrapped.completions.create(model="m", prompt="x", extra_body={"cache_salt": "own"})
    with Session(agent="nearer", predicts=False), agent("outer"), Session(agent="n\udce9arer"):
        create(model="m", messages=CHAT, tools=[READ, EDIT])  # type: ignore[list-item]
    create(model="m", messages=CHAT)
    assert [(body["cache_salt"], server.wire(n)["agent"]) for n, body in enumerate(server.bodies)] == [
        ("acme", "coder"),
        ("acme", "inner"),
        ("own", "coder"),
        ("client", "n?arer"),
        ("client", "client"),
    ]
    assert predicted(server.bodies[3]) is None
    assert [server.wire(n).get("task") for n in range(5)] == [None, "t", None, None, None]


def test_a_session_is_named_and_closed_where_it_was_open(
    wrapped: OpenAI, server: FakeServer, ran: Any, async_client: AsyncOpenAI
) -> None:
    """A conversation, a subagent's and another agent's; at their ends, on errors, and when the interpreter exits."""

    def ask(**extra: Any) -> Any:
        wrapped.chat.completions.create(model="m", messages=[user()], extra_body=extra or None)
        return server.bodies[-1].get("session_id")

    with suppress(ZeroDivisionError), Session(tenant="acme", agent="coder") as outer:
        assert ask() == ask() == outer.id
        assert outer.id.startswith("line:")
        assert ask(session_id="mine") == "mine"
        assert ask(session_params={"id": "x"}) is None
        with Session(predicts=False):
            assert ask() == outer.id
        with Session(agent="sub") as inner:
            assert ask() == inner.id != outer.id
        with agent("helper"):
            assert ask(cache_salt="b", extra_key="team") == f"{outer.id}/helper"
        raise ZeroDivisionError
    ids = [(inner.id, "acme"), (outer.id, "acme"), (f"{outer.id}/helper", "b")]
    assert [(one["session_id"], one["cache_salt"]) for one in server.closed] == ids
    assert [one.get("extra_key") for one in server.closed] == [None, None, "team"]
    assert {one["key"] for one in server.closed} == {"Bearer key"}
    session._close_all()
    assert len(server.closed) == 3

    async def main() -> None:
        create = wrap(async_client).chat.completions.create
        async with Session() as several:
            await create(model="m", messages=[user()])  # type: ignore[call-overload]
        assert server.closed[-1]["session_id"] == several.id
        with Session() as several:
            await create(model="m", messages=[user()])  # type: ignore[call-overload]
        await asyncio.gather(*session._tasks)
        assert server.closed[-1]["session_id"] == several.id
        with suppress(TimeoutError), anyio.fail_after(0.5):
            async with Session() as several:
                await create(model="m", messages=[user()])  # type: ignore[call-overload]
                await anyio.sleep(60)
        assert server.closed[-1]["session_id"] == several.id, "its scope was cancelled"

    ran(main())

    async def ends_with_its_loop() -> Session:
        create = wrap(AsyncOpenAI(base_url=server.base_url, api_key="key")).chat.completions.create
        with Session() as last:
            await create(model="m", messages=[user()])  # type: ignore[call-overload]
        return last

    assert asyncio.run(ends_with_its_loop()).id == server.closed[-1]["session_id"]
    with Session() as left:
        ask()
        session._close_all()
        assert server.closed[-1]["session_id"] == left.id
    assert len(server.closed) == 8
    assert not session._open


def test_over_an_http_client_a_session_is_closed_too(server: FakeServer) -> None:
    with OpenAI(base_url=server.base_url, api_key="key", http_client=http_client()) as client, Session() as one:
        client.chat.completions.create(model="m", messages=[user()])  # type: ignore[list-item]
    assert [body["session_id"] for body in (*server.bodies, *server.closed)] == [one.id] * 2


def test_a_server_that_closes_no_session_breaks_nothing(
    wrapped: OpenAI, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuses = {"close"}
    for _ in range(2):
        with Session():
            wrapped.chat.completions.create(model="m", messages=[user()])  # type: ignore[list-item]
    assert len(server.closed) == 2
    assert [record.message.count("/close_session") for record in caplog.records] == [1]
    server.refuses = {"session_id"}
    with Session(), pytest.warns(UserWarning, match="session_id"):
        wrapped.chat.completions.create(model="m", messages=[user()])  # type: ignore[list-item]
    assert "session_id" not in server.bodies[-1]


@pytest.mark.parametrize("route", ["chat", "responses", "messages"])
def test_a_file_that_was_read_is_predicted_for_tools_that_edit(wrapped: OpenAI, server: FakeServer, route: str) -> None:
    with Session():
        if route == "chat":
            wrapped.chat.completions.create(model="m", messages=CHAT, tools=[READ, EDIT])  # type: ignore[call-overload]
        elif route == "responses":
            wrapped.responses.create(model="m", input=OF_RESPONSES, tools=[{"type": "function", "name": "write"}])  # type: ignore[call-overload]
        else:
            body: Any = {"model": "m", "messages": OF_MESSAGES, "tools": [{"name": "Edit"}]}
            wrapped.post("/v1/messages", cast_to=object, body=body)
    assert predicted(server.bodies[0]) == FILE


@pytest.mark.parametrize(
    ("more", "tools", "expected"),
    [
        ([call(2, CHANGE), result(2, "ok")], [EDIT], FILE.replace("3.14", "pi")),
        ([call(2, {"path": "b.py", "content": "b = 1\n"})], [EDIT], "b = 1\n"),
        ([call(2, {"path": "b.py", "content": "b"}), call(3, CHANGE)], [EDIT], FILE.replace("3.14", "pi")),
        ([call(2, {"path": "a.py"}), result(2, "x = 2")], [EDIT], "x = 2"),
        ([call(2, {"command": "ls"}), result(2, "a.py")], [EDIT], FILE),
        ([call(2, {"path": ".", "pattern": "r"}), result(2, "a.py:1:def area(r):")], [EDIT], FILE),
        ([call(2, {"search": "3", "replace": "4"}), result(2, f"Done.\n{OPENED}1:x = 4\n")], [EDIT], "x = 4\n"),
        ([call(2, {"search": "3", "replace": "4"}), result(2, f"Not done.\n{OPENED}")], [EDIT], FILE),
        ([call(2, {"path": "b.py", "old_str": "3"}), result(2, "No such file.")], [EDIT], FILE),
        ([call(2, {"path": "b.py", "old_str": "3"}), result(2, "See:\n 1\tx = 4\n 2\ty\n")], [EDIT], "x = 4\ny\n"),
        (of_messages({"path": "b"}, is_error=True, content="None."), [EDIT], FILE),
        ([call(2, {"path": "b.py"}), result(2, "")], [EDIT], FILE),
        ([call(2, NESTED), call(3, '{"path": ' + NESTED + "}")], [EDIT], FILE),
        ([{"role": "assistant", "tool_calls": [{"id": 3, "function": {"arguments": "{"}}, 4]}], [EDIT], FILE),
        ([], [READ], None),
        ([], [], None),
    ],
)
def test_what_was_done_to_files_last_is_predicted(
    wrapped: OpenAI, server: FakeServer, more: Any, tools: Any, expected: str | None
) -> None:
    with Session():
        wrapped.chat.completions.create(model="m", messages=[*CHAT, *more, user()], tools=tools)
    assert predicted(server.bodies[0]) == expected


SOURCE = '#!/usr/bin/env python3\n\nclass A:\n    def area(self, r):\n        return r * r  # "é"\n'
SWE_AGENT = (
    "[File: a.py ({total} lines total)]\r\n{above}",
    "{below}\n(Open file: /repo/a.py)\n(Current directory: /repo)\nbash-$",
)
"""As in its published demonstrations, whose terminal ends lines with a carriage return."""


def view(gutter: str, frame: tuple[str, str] = ("", ""), end: str = "\n", first: int = 1) -> str:
    lines = SOURCE.splitlines()[first - 1 :]
    shown = "".join(gutter.format(number) + line + end for number, line in enumerate(lines, first))
    return frame[0] + shown + frame[1]


def swe_agent(total: int, above: str = "", below: str = "") -> tuple[str, str]:
    before, after = SWE_AGENT
    return before.format(total=total, above=above), after.format(below=below)


WINDOW = "".join(SOURCE.splitlines(True)[3:])
OPENHANDS = "[File: /w/a.py (5 lines total)]\n(this is the beginning of the file)\n"
DIGITS = f"{'1' * 5000}\ta\n{'2' * 5000}\tb\n"
YAML = "ports:\n  80: a\n  81: b\nhosts:\n- c\n"
ABOVE = swe_agent(94, "(3 more lines above)\r\n", "(89 more lines below)")
OPENCODE = ("<path>a.py</path>\n<type>file</type>\n<content>\n", "</content>")
VIEWS = {
    "swe-agent": (view("{}:", swe_agent(5), "\r\n"), SOURCE),
    "swe-agent's window": (view("{}:", ABOVE, "\r\n", 4), WINDOW),
    "one line": (view("{}:", swe_agent(5), "\r\n", 5), SOURCE.splitlines(True)[4]),
    "openhands": (view("{}|", (OPENHANDS, "(this is the end of the file)")), SOURCE),
    "cat -n": (view("{:6}\t", ("Here's the result of running `cat -n` on /w/a.py:\n", "")), SOURCE),
    "claude code": (view("{:6}→", ("", "\n<system-reminder>\nIs it\n1: malware?\n</system-reminder>\n")), SOURCE),
    "tabs": (view("{}\t"), SOURCE),
    "opencode's bars": (view("{:05}| ", ("<file>\n", "\n(End of file - total 5 lines)\n</file>")), SOURCE),
    "opencode's colons": (view("{}: ", OPENCODE, "\n", 4), WINDOW),
    "roo": (view("{:3} | ", ('<content lines="1-5">\n', "</content>\n")), SOURCE),
    "codex": (view("L{}: "), SOURCE),
    "bat": (view("{:4} │ "), SOURCE),
    "a fence": (f"File: `a.py`. Lines 1 to 5 (5 lines total):\n```python\n{SOURCE}```", SOURCE),
    "an element": (f'<file path="a.py">\n{SOURCE}</file>', SOURCE),
    "a header alone": (f"[File: a.py (5 lines total)]\n{SOURCE}bash-$", SOURCE),
    "results of a search": ("1:import os\n40:import re\n", None),
    "wrapped lines": ("1:import os\nand more\n2:import re\n3:a\n", None),
    "two views": (view("{}:", swe_agent(5)) + "\nBefore your edit:\n" + view("{}:", swe_agent(5)), None),
    "nothing": ("", None),
    "as it is": (SOURCE, SOURCE),
    "a time": ("12:30 we meet\n", "12:30 we meet\n"),
    "numbers of its own": (YAML, YAML),
    "numbers that Python does not read": (DIGITS, DIGITS),
}


@pytest.mark.parametrize(("shown", "expected"), VIEWS.values(), ids=VIEWS)
def test_views_are_predicted_without_what_they_add(
    wrapped: OpenAI, server: FakeServer, shown: str, expected: str | None
) -> None:
    messages: Any = [user(), call(1, {"path": "a.py"}), result(1, shown)]
    with Session():
        wrapped.chat.completions.create(model="m", messages=messages, tools=[EDIT])  # type: ignore[call-overload]
    assert predicted(server.bodies[0]) == expected


REMINDER = "\n<system-reminder>"
UNITS = ["\n", " \n", REMINDER, f"{REMINDER}</system-reminder>", "bash-$\n", "1\t\n", "9", "[File: ", "```\n"]


@pytest.mark.parametrize("unit", [*UNITS, "(1 ", "</file> ", "--- FILE CONTENT"])
def test_a_megabyte_of_anything_takes_no_minutes(unit: str) -> None:
    shown = unit * (2**20 // len(unit))
    for frame in ("", "<file>\n"):
        file_shown(frame + shown, "a.py")


def test_a_turn_costs_as_much_in_a_long_conversation() -> None:
    read: Counter[int] = Counter()

    class Message(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            read[id(self)] += 1
            return super().get(name, default)

    def turns(number: int, **arguments: str) -> int:
        read.clear()
        past = [one for n in range(number) for one in (call(n, arguments), result(n, FILE))]
        file_to_edit({"messages": [Message(one) for one in past], "tools": [EDIT]}, None)
        return read.total()

    assert turns(400, path="a") == turns(2, path="a")
    assert turns(4000, command="ls") == turns(2000, command="ls")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("strictly", [False, True])
def test_a_guess_that_fails_breaks_no_request_and_is_reported_once(
    client: OpenAI, server: FakeServer, monkeypatch: pytest.MonkeyPatch, strictly: bool
) -> None:
    def fails(*_: object) -> Any:
        raise ZeroDivisionError("a text of others")

    monkeypatch.setattr("whiflash_sdk.session.file_to_edit", fails)
    monkeypatch.setattr("whiflash_sdk.outgoing.derive_spans", fails)
    asked: Any = {"model": "m", "messages": CHAT, "tools": [EDIT]}
    with Session(), spans.code(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("error" if strictly else "always")
        for _ in range(2):
            assert wrap(client, agent=fails).chat.completions.create(**asked).choices
    assert [predicted(body) for body in server.bodies] == [None] * 2
    assert len(said) == (0 if strictly else 1)
    assert not said or "others" not in str(said[0].message)


def test_nothing_is_predicted_against_what_was_said(wrapped: OpenAI, server: FakeServer) -> None:
    asked: Any = {"model": "m", "messages": CHAT, "tools": [EDIT]}
    create = wrapped.chat.completions.create
    create(**asked)
    with Session():
        with predict(None):
            create(**asked)
        create(**asked, tool_choice="none")
    with Session(predicts=False):
        create(**asked)
    assert [predicted(body) for body in server.bodies] == [None] * 4
    with Session(), predict("mine"):
        create(**asked)
    assert predicted(server.bodies[-1]) == "mine"


def test_markup_writes_files_as_they_are(wrapped: OpenAI, server: FakeServer) -> None:
    server.capabilities["tool_call_parser"] = "qwen3_coder"
    with Session():
        wrapped.chat.completions.create(model="m", messages=CHAT, tools=[EDIT])  # type: ignore[call-overload]
    assert server.bodies[0]["prediction"]["content"] == FILE.rstrip("\n") + "\n"
