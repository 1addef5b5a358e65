"""`predict`: which calls carry a prediction, and that a call's own is nobody else's business."""

import asyncio
import warnings
from typing import Any

import pytest
from fake_server import CAPABILITIES, FakeServer
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import predict, wrap

MESSAGES: Any = [{"role": "user", "content": "Rename x."}]
OWN: Any = {"type": "content", "content": [{"type": "text", "text": "mine"}]}
BLOCK = {"type": "content", "content": "block"}


def ask(client: OpenAI, **more: Any) -> None:
    client.chat.completions.create(model="m", messages=MESSAGES, **more)


def test_a_block_predicts_for_every_route(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    with predict("block"):
        ask(client)
        list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
        client.completions.create(model="m", prompt="x")
        with predict("inner"):
            ask(client)
        with predict(None):
            ask(client)
    ask(client)
    found = [body.get("prediction") for body in server.bodies]
    assert found == [BLOCK, BLOCK, BLOCK, {**BLOCK, "content": "inner"}, None, None]


def test_bytes_that_are_no_text_end_no_step(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    with predict(b"caf\xe9 = 1".decode(errors="surrogateescape")):
        ask(client)
    assert server.bodies[0]["prediction"]["content"] == "caf? = 1"


def test_a_calls_own_prediction_is_left_as_it_is(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    with predict("block"):
        ask(client, prediction=OWN)
        client.completions.create(model="m", prompt="x", extra_body={"prediction": OWN})
    assert [body["prediction"] for body in server.bodies] == [OWN, OWN]


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_that_does_not_route_gets_what_the_call_said(
    client: OpenAI, server: FakeServer, status: int
) -> None:
    server.capabilities_status = status
    wrap(client)
    with warnings.catch_warnings(), predict("block"):
        warnings.simplefilter("ignore")
        ask(client, prediction=OWN)
        ask(client)
    assert [body.get("prediction") for body in server.bodies] == [OWN, None]


def test_a_server_of_before_gets_none_from_a_block(client: OpenAI, server: FakeServer) -> None:
    server.capabilities = {key: value for key, value in CAPABILITIES.items() if key != "prediction_tokens"}
    wrap(client)
    with predict("block"):
        ask(client)
    assert "prediction" not in server.bodies[0]
    with predict("block"):
        ask(wrap(client.with_options(), capabilities=True))
    assert server.bodies[1]["prediction"] == BLOCK


def test_tasks_at_the_same_time_keep_their_own(async_client: AsyncOpenAI, server: FakeServer) -> None:
    wrap(async_client)

    async def one(text: str) -> None:
        with predict(text):
            await asyncio.sleep(0)
            await async_client.chat.completions.create(model=text, messages=MESSAGES)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(str(i)) for i in range(5)))

    asyncio.run(all_of_them())
    assert len(server.bodies) == 5
    assert all(body["prediction"]["content"] == body["model"] for body in server.bodies)
