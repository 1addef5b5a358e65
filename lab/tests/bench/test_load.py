"""Asking and timing against a stand-in transport whose answers come when we say."""

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import pytest

from whiflash_lab.bench.cells import Load
from whiflash_lab.bench.load import Asker, RequestError, parse_stream
from whiflash_lab.bench.prompts import Prompt

PROMPTS = [Prompt(f"p{i}", "chat", ({"role": "user", "content": str(i)},)) for i in range(6)]


def data(event: dict[str, object]) -> str:
    return "data: " + json.dumps(event)


def choice(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}}]}


END: dict[str, object] = {"choices": [{"delta": {}, "finish_reason": "stop"}]}


def ids(*tokens: int, **details: object) -> dict[str, object]:
    return {"choices": [], "sglext": {"output_ids": [list(tokens)], **details}}


def test_times_and_forwards_of_a_stream() -> None:
    lines = [
        (0.10, data(choice(""))),
        (0.10, ""),
        (0.30, data(choice("ab"))),
        (0.50, data(END)),
        (0.60, data(ids(5, 6, 7, 8, 9, spec_tokens_details={"spec_verify_ct": 2}))),
        (0.70, "data: [DONE]"),
    ]
    answer = parse_stream("p", lines)
    assert (answer.ttft, answer.seconds, answer.tokens, answer.forwards) == (0.1, 0.5, (5, 6, 7, 8, 9), 2)
    assert answer.tpot == pytest.approx(0.1)


def test_plain_decoding_makes_a_forward_a_token() -> None:
    answer = parse_stream("p", [(0.1, data(END)), (0.2, data(ids(1, 2, 3)))])
    assert answer.forwards == 2
    single = parse_stream("p", [(0.1, data(END)), (0.2, data(ids(1)))])
    assert (single.forwards, single.tpot) == (0, None)


@pytest.mark.parametrize(
    "lines", [[], [(0.1, data(choice("a")))], [(0.1, data(END))], [(0.1, data({"error": {"message": "no"}}))]]
)
def test_a_broken_stream_is_an_error(lines: list[tuple[float, str]]) -> None:
    with pytest.raises(RequestError, match="prompt p"):
        parse_stream("p", lines)


class Held:
    """Answers nobody until `together` requests wait, then everybody.

    Knows how many it saw at once, and when they came by `clock`.
    """

    def __init__(self, together: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.together, self.clock = together, clock
        self.now = self.most = 0
        self.came: list[float] = []
        self.enough = asyncio.Event()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.came.append(self.clock())
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now >= self.together:
            self.enough.set()
        await self.enough.wait()
        self.now -= 1
        text = json.loads(request.content)["messages"][0]["content"]
        if text == "refused":
            return httpx.Response(400, text="too long")
        body = "\n\n".join([data(choice(text)), data(END), data(ids(int(text), 0)), "data: [DONE]"])
        return httpx.Response(200, text=body + "\n\n")


def run(server: Held, load: Load, prompts: list[Prompt]) -> list[tuple[str, tuple[int, ...]]]:
    async def whole() -> list[tuple[str, tuple[int, ...]]]:
        transport = httpx.MockTransport(server)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answers = await Asker(client, 8).run(load, prompts)
        return [(answer.prompt, answer.tokens) for answer in answers]

    return asyncio.run(whole())


@pytest.mark.parametrize("concurrency", [1, 4, 50])
def test_closed_loop_keeps_as_many_in_flight(concurrency: int) -> None:
    most = min(concurrency, len(PROMPTS))
    server = Held(most)
    answers = run(server, Load(value=concurrency), PROMPTS)
    assert answers == [(f"p{i}", (i, 0)) for i in range(6)], "in the prompts' order"
    assert server.most == most


def test_a_refused_request_names_its_prompt() -> None:
    refused = Prompt("bad", "chat", ({"role": "user", "content": "refused"},))
    with pytest.raises(RequestError, match="prompt bad: too long"):
        run(Held(1), Load(value=2), [*PROMPTS, refused])
