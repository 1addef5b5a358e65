"""`wrap`: what goes out, from every way a completion can be asked for, and what is left alone."""

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from fake_server import FakeServer
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

import whiflash_sdk
from whiflash_sdk import Hints, Span, UnsupportedServerError, UnsupportedServerWarning, hinted, spans, wrap

MESSAGES: Any = [{"role": "user", "content": "What is 2+2?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Work out an expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
HERMES = {"kind": "tool_call", "begin": "<tool_call>", "end": "</tool_call>"}
OWN = Hints(spans=(Span(kind="code", begin="<code>"),))


class City(BaseModel):
    city: str


def test_wrap_returns_the_same_object(client: OpenAI) -> None:
    assert wrap(client) is client
    assert type(client) is OpenAI


def test_a_trace_is_asked_for_and_spans_are_the_servers(client: OpenAI, server: FakeServer) -> None:
    wrap(client).chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL])
    assert server.wire() == {"trace": True}
    assert {k: v for k, v in server.bodies[0].items() if k != "custom_params"} == {
        "model": "m",
        "messages": MESSAGES,
        "tools": [TOOL],
    }


NAMED = {"type": "function", "function": {"name": "calculate"}}


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        ({"tools": [TOOL]}, ["prose", "tool_call", "json", "code"]),
        ({"tools": [TOOL], "tool_choice": "required"}, ["prose", "tool_call"]),
        ({"tools": [TOOL], "tool_choice": NAMED}, ["prose", "tool_call"]),
        ({"tools": [TOOL], "tool_choice": "none"}, ["prose", "json", "code"]),
        ({"response_format": {"type": "json_object"}}, ["prose", "json"]),
    ],
)
def test_a_blocks_span_joins_those_that_the_request_implies(
    client: OpenAI, server: FakeServer, asked: dict[str, Any], kinds: list[str]
) -> None:
    wrap(client)
    with spans.prose():
        client.chat.completions.create(model="m", messages=MESSAGES, **asked)
    assert [span["kind"] for span in server.hints()["spans"]] == kinds
    opened = {span["kind"] for span in server.hints()["spans"] if span.get("open")}
    assert opened - {"prose"} == ({kinds[1]} if len(kinds) == 2 else set())


def test_a_parsed_answer_keeps_its_trace(client: OpenAI, server: FakeServer) -> None:
    parsed = wrap(client).chat.completions.parse(model="m", messages=MESSAGES, response_format=City)
    assert parsed.choices[0].message.parsed == City(city="Zürich")
    assert whiflash_sdk.routing(parsed) is not None


def test_every_way_of_asking_carries_hints(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES, "extra_body": OWN.extra_body()}
    client.chat.completions.create(**asked)
    client.chat.completions.with_raw_response.create(**asked)
    with client.chat.completions.with_streaming_response.create(**asked) as streamed:
        streamed.read()
    list(client.chat.completions.create(**asked, stream=True))
    with client.chat.completions.stream(**asked) as events:
        events.get_final_completion()
    client.chat.completions.parse(**asked)
    client.beta.chat.completions.parse(model="m", messages=MESSAGES, extra_body=OWN.extra_body())
    client.completions.create(model="m", prompt="x", extra_body=OWN.extra_body())
    client.with_options(max_retries=1).chat.completions.create(**asked)
    client.copy().completions.create(model="m", prompt="x", extra_body=OWN.extra_body())
    assert len(server.bodies) == 10
    for index in range(10):
        assert server.hints(index) == {"spans": [{"kind": "code", "begin": "<code>"}], "trace": True}
    assert server.paths.count("/whiflash/capabilities") == 1


def test_views_cached_before_wrapping_take_hints_too(client: OpenAI, server: FakeServer) -> None:
    before = client.chat.completions.with_raw_response
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES}
    wrap(client)
    before.create(**asked)
    client.chat.completions.with_raw_response.create(**asked, extra_body=OWN.extra_body())
    assert server.hints(1)["spans"] == [{"kind": "code", "begin": "<code>"}]


def test_another_wrapper_around_create_stays(client: OpenAI, server: FakeServer) -> None:
    seen: list[str] = []
    inner = client.chat.completions.create

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append("called")
        return inner(*args, **kwargs)

    client.chat.completions.create = recording  # type: ignore[method-assign]
    wrap(client).chat.completions.create(model="m", messages=MESSAGES)
    assert seen == ["called"]
    assert server.hints()["trace"]


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_tracers_that_patch_the_class_see_wrapped_calls_in_either_order(
    client: OpenAI,
    async_client: AsyncOpenAI,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    wrapped_first: bool,
) -> None:
    """OpenInference's `instrument` replaces `request` on `OpenAI` and `AsyncOpenAI`."""
    seen: list[Any] = []

    def patch(kind: Any) -> None:
        request = kind.request

        def traced(self: Any, cast_to: Any, options: Any, **named: Any) -> Any:
            seen.append((self, options.url))
            return request(self, cast_to, options, **named)

        monkeypatch.setattr(kind, "request", traced)

    async def ask() -> None:
        await async_client.chat.completions.create(model="m", messages=MESSAGES)
        await async_client.close()

    if wrapped_first:
        wrap(client), wrap(async_client)
    patch(OpenAI), patch(AsyncOpenAI)
    wrap(client).chat.completions.create(model="m", messages=MESSAGES)
    wrap(async_client)
    asyncio.run(ask())
    assert [one for one, url in seen if url == "/chat/completions"] == [client, async_client]
    assert all(server.hints(index)["trace"] for index in (0, 1))


def test_a_request_method_of_the_clients_own_stays(client: OpenAI, server: FakeServer) -> None:
    seen: list[str] = []
    inner = client.request

    def recording(cast_to: Any, options: Any, **named: Any) -> Any:
        seen.append(options.url)
        return inner(cast_to, options, **named)

    client.request = recording  # type: ignore[method-assign]
    wrap(client).chat.completions.create(model="m", messages=MESSAGES)
    assert "/chat/completions" in seen
    assert server.hints()["trace"]


def test_the_innermost_level_wins(client: OpenAI, server: FakeServer) -> None:
    wrap(client, hints=Hints(off=True, spans=(Span(kind="prose", begin="client"),)), trace=False)
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES}
    client.chat.completions.create(**asked)
    with hinted(Hints(spans=(Span(kind="prose", begin="block"),))):
        client.chat.completions.create(**asked)
        with hinted(Hints(trace=True)):
            client.chat.completions.create(**asked, extra_body=Hints(off=False).extra_body())
    assert server.hints(0) == {"spans": [{"kind": "prose", "begin": "client"}], "off": True}
    assert server.hints(1) == {"spans": [{"kind": "prose", "begin": "block"}], "off": True}
    assert server.hints(2) == {"spans": [{"kind": "prose", "begin": "block"}], "trace": True}


def test_a_second_wrap_changes_nobodys_settings(client: OpenAI, server: FakeServer) -> None:
    """The same settings are no others, and a copy may have its own, also one of a copy."""
    told: dict[str, Any] = {"agent": "a", "tenant": "t", "hints": OWN}
    copies = [client.with_options(), wrap(wrap(client, **told), **told).with_options()]
    copies.append(copies[1].copy())
    for name, other in {"agent": "b", "tenant": None, "hints": Hints(off=True), "strict": True}.items():
        with pytest.raises(ValueError, match=f"wrapped already, with other {name}"):
            wrap(client, **{**told, name: other})
    with pytest.raises(ValueError, match=r"other hints\. .*with_options"):
        wrap(client, **told, trace=False)
    wrap(client, **told, trace="summary")  # what the default is
    for number, copy in enumerate(copies):
        wrap(copy, agent=str(number))
    for one in (client, *copies):
        one.chat.completions.create(model="m", messages=MESSAGES)
    assert [server.hints(index)["agent"] for index in range(4)] == ["a", "0", "1", "2"]
    assert [body.get("cache_salt") for body in server.bodies] == ["t", None, None, None]


def test_a_block_opens_its_kind(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    with spans.tool_call(prefer="lookup", bias={"ar": -1}):
        client.chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL])
        client.chat.completions.create(model="m", messages=MESSAGES)
    client.chat.completions.create(model="m", messages=MESSAGES)
    wishes = {"open": True, "prefer": "lookup", "bias": {"ar": -1.0}}
    assert server.hints(0)["spans"][0] == {**HERMES, **wishes}
    assert server.hints(1)["spans"][0] == {"kind": "tool_call", **wishes}
    assert "spans" not in server.hints(2)


def test_infer_false_derives_nothing(client: OpenAI, server: FakeServer) -> None:
    wrap(client, hints=Hints(infer=False), trace=False)
    client.chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL])
    assert server.hints() == {"infer": False}


def test_other_custom_params_and_extra_body_stay(client: OpenAI, server: FakeServer) -> None:
    extra = {"custom_params": {"thinking_budget": 5}, "top_k": 3}
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES, "extra_body": OWN.extra_body(extra)}
    wrap(client).chat.completions.create(**asked)
    assert server.hints()["spans"] == [{"kind": "code", "begin": "<code>"}]
    assert server.bodies[0]["custom_params"]["thinking_budget"] == 5
    assert server.bodies[0]["top_k"] == 3
    assert extra == {"custom_params": {"thinking_budget": 5}, "top_k": 3}


def test_other_routes_are_left_alone(client: OpenAI, server: FakeServer) -> None:
    wrap(client).models.list()
    assert server.paths == ["/v1/models"]


def test_retries_carry_the_hints_again(client: OpenAI, server: FakeServer) -> None:
    server.failures = 1
    wrap(client).chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL])
    assert server.hints(0) == server.hints(1)


def test_the_key_goes_to_the_capabilities_route(client: OpenAI, server: FakeServer) -> None:
    assert whiflash_sdk.capabilities(client) == whiflash_sdk.Capabilities(
        version=1,
        server_version="0.1.0",
        model="tiny",
        policy="auto",
        arms=("ar", "diffusion", "lookup", "none"),
        traces=("summary", "full"),
        scopes=("agent", "query", "structure"),
        prediction_tokens=16384,
        tool_call_parser="hermes",
    )


@pytest.mark.parametrize(
    ("status", "document"), [(404, None), (401, None), (200, []), (200, {"version": 2}), (200, "x")]
)
def test_a_server_that_does_not_route_gets_no_hints(
    client: OpenAI, server: FakeServer, status: int, document: Any
) -> None:
    server.capabilities_status, server.capabilities, server.trace = status, document, None
    wrap(client)
    asked: dict[str, Any] = {
        "model": "m",
        "messages": MESSAGES,
        "tools": [TOOL],
        "extra_body": OWN.extra_body(),
    }
    with pytest.warns(UnsupportedServerWarning, match="whiflash/capabilities"):
        response = client.chat.completions.create(**asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.chat.completions.create(**{**asked, "extra_body": {"custom_params": {"a": 1}}})
    assert server.bodies[0] == {"model": "m", "messages": MESSAGES, "tools": [TOOL]}
    assert server.bodies[1]["custom_params"] == {"a": 1}
    assert server.paths.count("/whiflash/capabilities") == 1
    assert whiflash_sdk.routing(response) is None


def test_strict_says_so_instead(client: OpenAI, server: FakeServer) -> None:
    server.capabilities_status = 404
    wrap(client, strict=True)
    for _ in range(2):
        with pytest.raises(UnsupportedServerError, match="whiflash serve"):
            client.chat.completions.create(model="m", messages=MESSAGES)
    assert server.bodies == []


def test_strict_holds_for_async_clients_and_streams(async_client: AsyncOpenAI, server: FakeServer) -> None:
    server.capabilities_status = 404
    wrap(async_client, strict=True)

    async def main() -> None:
        with pytest.raises(UnsupportedServerError, match="strict=False"):
            await async_client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        with pytest.raises(UnsupportedServerError):
            await async_client.completions.create(model="m", prompt="x")
        await async_client.close()

    asyncio.run(main())
    assert server.bodies == []


def test_async_clients_parse_too(async_client: AsyncOpenAI, server: FakeServer) -> None:
    async def main() -> Any:
        parsed = await wrap(async_client).chat.completions.parse(
            model="m", messages=MESSAGES, response_format=City
        )
        await async_client.close()
        return parsed

    parsed = asyncio.run(main())
    assert parsed.choices[0].message.parsed == City(city="Zürich")
    assert whiflash_sdk.routing(parsed) is not None


def test_a_server_that_is_down_fails_as_it_does_unwrapped() -> None:
    client = wrap(OpenAI(base_url="http://127.0.0.1:9/v1", api_key="key", max_retries=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(openai.APIConnectionError):
                client.chat.completions.create(model="m", messages=MESSAGES)
    strict = wrap(client.with_options(), strict=True)
    with pytest.raises(UnsupportedServerError):
        strict.chat.completions.create(model="m", messages=MESSAGES)


def test_async_clients_are_the_same(async_client: AsyncOpenAI, server: FakeServer) -> None:
    assert wrap(async_client) is async_client

    async def main() -> None:
        asked: dict[str, Any] = {"model": "m", "messages": MESSAGES, "tools": [TOOL]}
        with spans.tool_call():
            await async_client.chat.completions.create(**asked)
        async for _ in await async_client.chat.completions.create(**asked, stream=True):
            pass
        async with async_client.chat.completions.stream(**asked, extra_body=OWN.extra_body()) as events:
            await events.get_final_completion()
        await async_client.with_options(max_retries=1).completions.create(model="m", prompt="x")
        await async_client.chat.completions.with_raw_response.create(**asked)
        await async_client.close()

    asyncio.run(main())
    assert server.hints(0)["spans"][0] == {**HERMES, "open": True}
    assert server.hints(1) == {"trace": True}
    assert server.hints(2)["spans"] == [{"kind": "code", "begin": "<code>"}]
    assert len(server.bodies) == 5
    assert server.paths.count("/whiflash/capabilities") == 1


def test_tasks_that_start_together_ask_once(async_client: AsyncOpenAI, server: FakeServer) -> None:
    wrap(async_client)
    server.capabilities_seconds = 0.1

    async def main() -> None:
        asked: Any = {"model": "m", "messages": MESSAGES, "tools": [TOOL]}
        await asyncio.gather(*(async_client.chat.completions.create(**asked) for _ in range(8)))
        await async_client.close()

    asyncio.run(main())
    assert server.paths.count("/whiflash/capabilities") == 1
    assert all(server.hints(index) == {"trace": True} for index in range(8))


def test_threads_that_start_together_ask_once(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    server.capabilities_seconds = 0.1
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.completions.create(model="m", prompt="x"), range(8)))
    assert server.paths.count("/whiflash/capabilities") == 1
    assert len(server.bodies) == 8
    assert all("whiflash" in body["custom_params"] for body in server.bodies)


def test_a_task_that_gives_up_leaves_the_question_to_the_next(
    async_client: AsyncOpenAI, server: FakeServer
) -> None:
    server.silent.set()

    async def main() -> list[Any]:
        asking = [asyncio.create_task(whiflash_sdk.async_capabilities(async_client)) for _ in range(3)]
        while not server.paths:
            await asyncio.sleep(0.01)
        asking[0].cancel()
        server.silent.clear()
        found = await asyncio.gather(*asking, return_exceptions=True)
        await async_client.close()
        return found

    first, *others = asyncio.run(main())
    assert isinstance(first, asyncio.CancelledError)
    assert all(isinstance(found, whiflash_sdk.Capabilities) for found in others)
    assert server.paths.count("/whiflash/capabilities") == 2


def test_concurrent_tasks_keep_their_own_blocks(async_client: AsyncOpenAI, server: FakeServer) -> None:
    wrap(async_client)

    async def ask(kind: str) -> None:
        with getattr(spans, kind)():
            await asyncio.sleep(0)
            await async_client.completions.create(model=kind, prompt="x")

    async def main() -> None:
        await asyncio.gather(*(ask(kind) for kind in ("prose", "reasoning", "tool_call")))
        await async_client.close()

    asyncio.run(main())
    assert {body["model"]: server.hints(i)["spans"][0]["kind"] for i, body in enumerate(server.bodies)} == {
        kind: kind for kind in ("prose", "reasoning", "tool_call")
    }


def test_misuse_says_what_to_give(client: OpenAI) -> None:
    with pytest.raises(TypeError, match="OpenAI or AsyncOpenAI"):
        wrap("client")  # type: ignore[type-var]
    wrap(client)
    asked: dict[str, Any] = {"model": "m", "messages": MESSAGES}
    with pytest.raises(whiflash_sdk.HintError, match=r"custom_params.*mapping"):
        OWN.extra_body({"custom_params": "text"})
    params = {"whiflash": '{"spans":[{"kind":"poem","open":true}]}'}
    with pytest.raises(whiflash_sdk.HintError, match=r"whiflash\.spans\[0\]\.kind"):
        client.chat.completions.create(**asked, extra_body={"custom_params": params})


@pytest.mark.parametrize("parsers", [("of_a_later_release", None), ("hermes", "of_a_later_release")])
def test_an_unknown_parser_leaves_the_spans_to_the_server(
    client: OpenAI, server: FakeServer, parsers: tuple[str, str | None]
) -> None:
    """The server may know the markers, and infers spans only for a request that has none."""
    server.capabilities |= dict(zip(("tool_call_parser", "reasoning_parser"), parsers, strict=True))
    wrap(client)
    with spans.json():
        client.chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL])
    assert server.wire()["spans"] == [{"kind": "json", "open": True}]


@pytest.mark.parametrize("way", ["create", "raw", "async"])
def test_warnings_point_at_the_users_call(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, way: str
) -> None:
    server.capabilities_status = 404

    async def main() -> None:
        await wrap(async_client).chat.completions.create(model="m", messages=MESSAGES)
        await async_client.close()

    ways = {
        "create": lambda: wrap(client).chat.completions.create(model="m", messages=MESSAGES),
        "raw": lambda: wrap(client).with_raw_response.completions.create(model="m", prompt="x"),
        "async": lambda: asyncio.run(main()),
    }
    with pytest.warns(UnsupportedServerWarning) as said:
        ways[way]()
    assert [one.filename for one in said] == [__file__]


def test_warnings_of_repeated_requests_point_at_the_users_call(client: OpenAI, server: FakeServer) -> None:
    server.refuses = {"custom_params"}
    for given in (None, True):
        one = wrap(client.with_options(), capabilities=given)
        with pytest.warns(UnsupportedServerWarning, match="custom_params") as said:
            one.chat.completions.create(model="m", messages=MESSAGES)
        assert [one.filename for one in said] == [__file__]


ASKED_OF_TENANTS: Any = {"model": "m", "messages": [{"role": "user", "content": "Where?"}]}


def test_a_tenant_is_sent_as_a_salt(client: OpenAI, server: FakeServer) -> None:
    wrap(client, tenant="acme")
    client.chat.completions.create(**ASKED_OF_TENANTS)
    client.completions.create(model="m", prompt="x")
    client.chat.completions.create(**ASKED_OF_TENANTS, extra_body={"cache_salt": "own"})
    assert [body.get("cache_salt") for body in server.bodies] == ["acme", "acme", "own"]


def test_no_tenant_goes_to_a_server_that_does_not_route(client: OpenAI, server: FakeServer) -> None:
    server.capabilities_status = 404
    wrap(client, tenant="acme", capabilities=False)
    client.chat.completions.create(**ASKED_OF_TENANTS)
    assert "cache_salt" not in server.bodies[0]


def test_a_tenant_that_is_refused_is_left_out(client: OpenAI, server: FakeServer) -> None:
    server.refuses = {"cache_salt"}
    with pytest.warns(UnsupportedServerWarning, match="cache_salt"):
        wrap(client, tenant="acme").chat.completions.create(**ASKED_OF_TENANTS)
    assert "cache_salt" not in server.bodies[-1]


def test_an_empty_tenant_is_refused(client: OpenAI) -> None:
    with pytest.raises(ValueError, match="tenant"):
        wrap(client, tenant="")
