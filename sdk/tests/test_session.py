"""`Session`: salt, agent and turn of every request, and the file that an edit is likely to write."""

import asyncio
import json
from typing import Any

import pytest
from fake_server import CAPABILITIES, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Session, agent, predict, wrap

FILE = 'def area(r):\n\treturn 3.14 * r * r  # "é"\n'
NUMBERED = "".join(f"{number:6}\t{line}\n" for number, line in enumerate(FILE.splitlines(), 1))
NONE: Any = {"type": "object", "properties": {}}
READ, EDIT = (
    {"type": "function", "function": {"name": name, "parameters": NONE}}
    for name in ("read_file", "edit_file")
)
CHANGE = {"path": "a.py", "old_string": "3.14", "new_string": "pi"}


def call(number: int, arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
    }


def user(text: str = "Do it.") -> dict[str, Any]:
    return {"role": "user", "content": text}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": text}


CHAT = [user(), call(1, {"path": "a.py"}), result(1, NUMBERED)]
OF_MESSAGES: Any = [
    user(),
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "c", "name": "Read", "input": {"file_path": "a"}}],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"text": NUMBERED}]}],
    },
]
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
    server.capabilities = {
        **CAPABILITIES,
        "routes": ["chat/completions", "completions", "messages", "responses"],
    }
    return wrap(client, agent="client", tenant="client")


def test_every_request_carries_who_asks_and_its_turn(wrapped: OpenAI, server: FakeServer) -> None:
    create = wrapped.chat.completions.create
    with Session(tenant="acme", agent="coder"):
        create(model="m", messages=[user()])
        create(model="m", messages=[*CHAT, user("And now?")])
        with agent("inner", query="q"), Session():
            create(model="m", messages=CHAT)
        wrapped.completions.create(model="m", prompt="x", extra_body={"cache_salt": "own"})
    create(model="m", messages=CHAT)
    found = [
        (body["cache_salt"], server.wire(n)["agent"], server.wire(n).get("query"))
        for n, body in enumerate(server.bodies)
    ]
    assert found == [
        ("acme", "coder", 1),
        ("acme", "coder", 2),
        ("client", "inner", "q"),
        ("own", "coder", None),
        ("client", "client", None),
    ]


@pytest.mark.parametrize("route", ["chat", "responses", "messages"])
def test_a_file_that_was_read_is_predicted_for_tools_that_edit(
    wrapped: OpenAI, server: FakeServer, route: str
) -> None:
    with Session():
        if route == "chat":
            wrapped.chat.completions.create(model="m", messages=CHAT, tools=[READ, EDIT])  # type: ignore[call-overload]
        elif route == "responses":
            wrapped.responses.create(
                model="m", input=OF_RESPONSES, tools=[{"type": "function", "name": "write"}]
            )  # type: ignore[call-overload]
        else:
            wrapped.post(
                "/v1/messages",
                cast_to=object,
                body={"model": "m", "messages": OF_MESSAGES, "tools": [{"name": "Edit"}]},
            )
    assert predicted(server.bodies[0]) == FILE


@pytest.mark.parametrize(
    ("more", "tools", "expected"),
    [
        ([call(2, CHANGE)], [EDIT], FILE.replace("3.14", "pi")),
        ([call(2, CHANGE), result(2, "ok")], [EDIT], FILE.replace("3.14", "pi")),
        ([call(2, {"path": "b.py", "content": "b = 1\n"})], [EDIT], "b = 1\n"),
        ([call(2, {"path": "a.py"}), result(2, "x = 2")], [EDIT], "x = 2"),
        ([call(2, {"command": "ls"}), result(2, "a.py")], [EDIT], FILE),
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


def test_one_session_in_several_tasks(async_client: AsyncOpenAI, server: FakeServer) -> None:
    mine, other = Session(agent="mine"), Session(agent="other")

    async def ask(session: Session, name: str) -> None:
        with session:
            await asyncio.sleep(0)
            await wrap(async_client).completions.create(model=name, prompt="x")
        await async_client.completions.create(model="none", prompt="x")

    async def main() -> None:
        await asyncio.gather(*(ask(one, str(one.agent)) for one in (mine, other, mine)))
        await async_client.close()

    asyncio.run(main())
    assert {body["model"]: server.wire(n).get("agent", "none") for n, body in enumerate(server.bodies)} == {
        name: name for name in ("mine", "other", "none")
    }


def test_an_empty_tenant_is_refused() -> None:
    with pytest.raises(ValueError, match="tenant"):
        Session(tenant="")
