"""A user's program, for type checkers: `test_types.py` has it checked, strictly, and nobody runs it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from pydantic import BaseModel

import whiflash_sdk
from whiflash_sdk import Capabilities, Collected, Hints, Span, Trace, collect, hinted, routing, spans, wrap


class City(BaseModel):
    name: str


class Mine(OpenAI):
    """A client of the user's own."""


MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Where?"}]
HINTS = Hints(spans=[Span(kind="json", begin="<answer>", end="</answer>", bias={"structure": 1.5})])


def mean(trace: Trace | None) -> float:
    return 0.0 if trace is None else trace.acceptance_length


def ask(client: OpenAI) -> ChatCompletion:
    return client.chat.completions.create(model="m", messages=MESSAGES, extra_body=HINTS.extra_body({"top_k": 20}))


def main() -> list[float]:
    client: Mine = wrap(Mine(), hints=HINTS, strict=True, capabilities=Capabilities(version=1))
    with hinted(Hints(off=True)), spans.code(prefer="diffusion"):
        response = ask(client)
    parsed = client.chat.completions.parse(
        model="m", messages=MESSAGES, response_format=City, extra_body=HINTS.extra_body()
    )
    city: City | None = parsed.choices[0].message.parsed
    text = client.completions.create(model="m", prompt=city.name if city else "x", extra_body=HINTS.extra_body())
    for chunk in client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, extra_body=HINTS.extra_body()
    ):
        print(chunk.choices[0].delta.content)
    collected: Collected
    with collect(client) as collected, ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, [client, client.with_options(timeout=9)]))
    found: Capabilities | None = whiflash_sdk.capabilities(client)
    print(found, len(answers), routing(response))
    return [mean(routing(text)), *(mean(trace) for trace in collected.traces)]


def below() -> ChatCompletion:
    http = whiflash_sdk.http_client(agent="a", strict=True)
    given = whiflash_sdk.async_http_client(DefaultAsyncHttpxClient(timeout=9), tenant="t")
    print(AsyncOpenAI(http_client=given))
    return ask(OpenAI(http_client=http))


async def asynchronous() -> str | None:
    client: AsyncOpenAI = wrap(AsyncOpenAI(), trace=False)
    with collect() as collected:
        response = await client.chat.completions.create(model="m", messages=MESSAGES, extra_body=HINTS.extra_body())
    print(collected.traces, await whiflash_sdk.async_capabilities(client))
    return response.choices[0].message.content


if __name__ == "__main__":
    print(below(), main(), asyncio.run(asynchronous()))
