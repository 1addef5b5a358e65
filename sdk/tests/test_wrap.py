"""`wrap`: what goes out, from every way a completion can be asked for, and what is left alone."""

import inspect
import json
import warnings
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import openai
import pytest
from fake_server import ASKED, EXPECTED, ROUTE, FakeServer, ask
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

import whiflash_sdk
from whiflash_sdk import Capabilities, Hints, Span, UnsupportedServerError, agent, collect, hinted, predict, spans, wrap

SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
FUNCTION = {"name": "calculate", "parameters": {**SCHEMA, "additionalProperties": False}, "strict": True}
TOOL: Any = {"type": "function", "function": FUNCTION}
NAMED = {"type": "function", "function": {"name": "calculate"}}
HERMES = {"kind": "tool_call", "begin": "<tool_call>", "end": "</tool_call>"}
CODE = [{"kind": "code", "begin": "<code>"}]
OWN = Hints(spans=(Span(kind="code", begin="<code>"),))


class City(BaseModel):
    city: str


def test_hints_join_what_the_call_says_and_nothing_else_changes(client: OpenAI, server: FakeServer) -> None:
    """Spans are the server's to derive; a retry carries the hints again; other routes are left alone."""
    assert wrap(client) is client
    assert type(client) is OpenAI
    server.failures = 1
    extra = {"custom_params": {"thinking_budget": 5}, "top_k": 3}
    ask(client, tools=[TOOL], extra_body=extra)
    assert server.wire(0) == server.wire(1) == {"trace": True}
    ask(client, extra_body=OWN.extra_body(extra))
    assert server.hints()["spans"] == CODE
    first, last = ({**server.bodies[index], "custom_params": 0} for index in (1, 2))
    assert first == {**ASKED, "tools": [TOOL], "top_k": 3, "custom_params": 0}
    assert last == {**ASKED, "top_k": 3, "custom_params": 0}
    assert {body["custom_params"]["thinking_budget"] for body in server.bodies} == {5}
    assert extra == {"custom_params": {"thinking_budget": 5}, "top_k": 3}
    client.models.list()
    assert server.paths[-1] == "/v1/models"


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        ({"tools": [TOOL]}, ["prose", "tool_call", "json", "code"]),
        ({"tools": [TOOL], "tool_choice": "required"}, ["prose", "tool_call"]),
        ({"tools": [TOOL], "tool_choice": NAMED}, ["prose", "tool_call"]),
        ({"tools": [TOOL], "tool_choice": "none"}, ["prose", "json", "code"]),
        ({"response_format": {"type": "json_object"}}, ["prose", "json"]),
        ({"tools": [TOOL], "extra_body": Hints(infer=False).extra_body()}, ["prose"]),
    ],
)
def test_a_blocks_span_joins_those_that_the_request_implies(
    client: OpenAI, server: FakeServer, asked: dict[str, Any], kinds: list[str]
) -> None:
    wrap(client)
    with spans.prose():
        ask(client, **asked)
    assert [span["kind"] for span in server.hints()["spans"]] == kinds
    opened = {span["kind"] for span in server.hints()["spans"] if span.get("open")}
    assert opened - {"prose"} == ({kinds[1]} if len(kinds) == 2 else set())


@pytest.mark.parametrize("parsers", [("of_a_later_release", None), ("hermes", "of_a_later_release")])
def test_an_unknown_parser_leaves_the_spans_to_the_server(
    client: OpenAI, server: FakeServer, parsers: tuple[str, str | None]
) -> None:
    """The server may know the markers, and infers spans only for a request that has none."""
    server.capabilities |= dict(zip(("tool_call_parser", "reasoning_parser"), parsers, strict=True))
    wrap(client)
    with spans.json():
        ask(client, tools=[TOOL])
    assert server.wire()["spans"] == [{"kind": "json", "open": True}]


def test_a_block_opens_its_kind(client: OpenAI, server: FakeServer) -> None:
    wrap(client)
    with spans.tool_call(prefer="lookup", bias={"ar": -1}):
        ask(client, tools=[TOOL])
        ask(client)
    ask(client)
    wishes = {"open": True, "prefer": "lookup", "bias": {"ar": -1.0}}
    assert server.hints(0)["spans"][0] == {**HERMES, **wishes}
    assert server.hints(1)["spans"][0] == {"kind": "tool_call", **wishes}
    assert "spans" not in server.hints(2)


def test_every_way_of_asking_carries_hints_and_is_collected(client: OpenAI, server: FakeServer) -> None:
    """Views that were made before the client was wrapped, too."""
    before = client.chat.completions.with_raw_response
    wrap(client)
    chat, own = client.chat.completions, OWN.extra_body()
    asked: dict[str, Any] = {**ASKED, "extra_body": own}
    with collect() as collected:
        before.create(**asked)
        chat.with_raw_response.create(**asked)
        with chat.with_streaming_response.create(**asked) as streamed:
            assert streamed.json()["object"] == "chat.completion"  # type: ignore[index]
        list(ask(client, stream=True, extra_body=own))
        with chat.stream(**asked) as events:
            events.get_final_completion()
        parsed = chat.parse(**asked, response_format=City)
        client.beta.chat.completions.parse(**asked)
        client.completions.create(model="m", prompt="x", extra_body=own)
        ask(client.with_options(max_retries=1), extra_body=own)
        client.copy().completions.create(model="m", prompt="x", extra_body=own)
    assert [server.hints(index) for index in range(10)] == [{"spans": CODE, "trace": True}] * 10
    assert [trace.arms for trace in collected.traces] == [EXPECTED.arms] * 10
    assert server.paths.count(ROUTE) == 1
    assert parsed.choices[0].message.parsed == City(city="Zürich")
    assert whiflash_sdk.routing(parsed) == EXPECTED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_body_of_bytes_goes_out_as_it_is(client: OpenAI, server: FakeServer) -> None:
    names = {"body", "content"} & inspect.signature(client.post).parameters.keys()  # the latter is of openai 3
    for name in names:
        given: Any = {name: json.dumps(ASKED).encode()}
        wrap(client).post("/chat/completions", cast_to=object, **given)
    assert server.bodies == [ASKED] * len(names)


def test_async_clients_are_the_same(async_client: AsyncOpenAI, server: FakeServer, ran: Any) -> None:
    assert wrap(async_client) is async_client
    chat = async_client.chat.completions

    async def main() -> None:
        with spans.tool_call():
            await chat.create(**ASKED, tools=[TOOL])
        async for _ in await chat.create(**ASKED, stream=True):
            pass
        async with chat.stream(**ASKED, extra_body=OWN.extra_body()) as events:
            await events.get_final_completion()
        await async_client.with_options(max_retries=1).completions.create(model="m", prompt="x")
        await chat.with_raw_response.create(**ASKED)
        parsed = await chat.parse(**ASKED, response_format=City)
        assert parsed.choices[0].message.parsed == City(city="Zürich")
        assert whiflash_sdk.routing(parsed) == EXPECTED

    ran(main())
    assert server.hints(0)["spans"][0] == {**HERMES, "open": True}
    assert server.hints(1) == {"trace": True}
    assert server.hints(2)["spans"] == CODE
    assert server.routed() == [True] * 6
    assert server.paths.count(ROUTE) == 1


def test_wrappers_of_the_clients_own_methods_stay(client: OpenAI, server: FakeServer) -> None:
    seen: list[str] = []
    create, request = client.chat.completions.create, client.request

    def creating(*args: Any, **kwargs: Any) -> Any:
        seen.append("create")
        return create(*args, **kwargs)

    def requesting(cast_to: Any, options: Any, **named: Any) -> Any:
        seen.append(options.url)
        return request(cast_to, options, **named)

    client.chat.completions.create = creating  # type: ignore[method-assign]
    client.request = requesting  # type: ignore[method-assign]
    ask(wrap(client))
    assert [seen[0], seen[-1]] == ["create", "/chat/completions"]
    assert server.hints()["trace"]


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_tracers_that_patch_the_class_see_wrapped_calls_in_either_order(
    client: OpenAI,
    async_client: AsyncOpenAI,
    server: FakeServer,
    ran: Any,
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

    if wrapped_first:
        wrap(client), wrap(async_client)
    patch(OpenAI), patch(AsyncOpenAI)
    ask(wrap(client))
    ran(wrap(async_client).chat.completions.create(**ASKED))
    assert [one for one, url in seen if url == "/chat/completions"] == [client, async_client]
    assert server.said("trace") == [True, True]


def test_the_innermost_level_wins(client: OpenAI, server: FakeServer) -> None:
    wrap(client, hints=Hints(off=True, spans=(Span(kind="prose", begin="client"),)), trace=False)
    ask(client)
    with hinted(Hints(spans=(Span(kind="prose", begin="block"),))):
        ask(client)
        with hinted(Hints(trace=True)):
            ask(client, extra_body=Hints(off=False).extra_body())
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
        ask(one)
    assert server.said("agent") == ["a", "0", "1", "2"]
    assert [body.get("cache_salt") for body in server.bodies] == ["t", None, None, None]


NO_SERVER = [(404, None), (401, None), (503, None), (200, []), (200, {"version": 2}), (200, "x")]


@pytest.mark.parametrize(("status", "document"), NO_SERVER)
def test_a_server_that_does_not_route_gets_what_the_call_says(
    client: OpenAI, server: FakeServer, status: int, document: Any
) -> None:
    server.capabilities_status, server.capabilities, server.trace = status, document, None
    wrap(client, agent=lambda: "framework", tenant="acme")
    own: Any = {"type": "content", "content": "mine"}
    with agent("planner"), predict("block"):
        with pytest.warns(whiflash_sdk.UnsupportedServerWarning, match="whiflash/capabilities"):
            response = ask(client, tools=[TOOL], extra_body=OWN.extra_body(), prediction=own)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ask(client, extra_body={"custom_params": {"a": 1}})
            client.responses.create(model="m", input="x", extra_body={"top_k": 3})
    assert server.bodies == [
        {**ASKED, "tools": [TOOL], "prediction": own},
        {**ASKED, "custom_params": {"a": 1}},
        {"model": "m", "input": "x", "top_k": 3},
    ]
    assert server.paths.count(ROUTE) == 1
    assert whiflash_sdk.routing(response) is None


def test_strict_says_so_instead(client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any) -> None:
    server.capabilities_status = 404
    wrap(client, strict=True), wrap(async_client, strict=True)
    for _ in range(2):
        with pytest.raises(UnsupportedServerError, match="whiflash serve"):
            ask(client)

    async def main() -> None:
        with pytest.raises(UnsupportedServerError, match="strict=False"):
            await async_client.chat.completions.create(**ASKED, stream=True)

    ran(main())
    assert server.bodies == []


def test_a_server_that_is_down_fails_as_it_does_unwrapped() -> None:
    client = wrap(OpenAI(base_url="http://127.0.0.1:9/v1", api_key="key", max_retries=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(openai.APIConnectionError):
                ask(client)
    with pytest.raises(UnsupportedServerError, match="could not be reached"):
        ask(wrap(client.with_options(), strict=True))


def test_an_exception_whose_response_is_no_answer_is_raised_as_it_is(client: OpenAI) -> None:
    class TheirError(Exception):
        response = MappingProxyType({"Error": "expired"})  # botocore's is a dictionary

    def fails(*_: Any, **__: Any) -> Any:
        raise TheirError

    client.request = fails  # type: ignore[method-assign]
    with pytest.raises(TheirError):
        ask(wrap(client))


def test_misuse_says_what_to_give(client: OpenAI) -> None:
    with pytest.raises(TypeError, match="OpenAI or AsyncOpenAI"):
        wrap("client")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="tenant"):
        wrap(client, tenant="")
    below = OpenAI(base_url=client.base_url, api_key="k", http_client=whiflash_sdk.http_client())
    with pytest.raises(ValueError, match="sends hints already"):
        wrap(below)
    with pytest.raises(whiflash_sdk.HintError, match=r"custom_params.*mapping"):
        OWN.extra_body({"custom_params": "text"})
    params = {"whiflash": '{"spans":[{"kind":"poem","open":true}]}'}
    with pytest.raises(whiflash_sdk.HintError, match=r"whiflash\.spans\[0\]\.kind"):
        ask(wrap(client), extra_body={"custom_params": params})


@pytest.mark.parametrize("way", ["create", "raw", "async", "repeated", "repeated, assumed", "repeated, below"])
def test_warnings_point_at_the_users_call(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any, way: str
) -> None:
    if way.startswith("repeated"):
        server.refuses = {"custom_params"}
        wrap(client, capabilities=True if "assumed" in way else None)
    else:
        server.capabilities_status = 404

    async def main() -> None:
        await wrap(async_client).chat.completions.create(**ASKED)

    below = OpenAI(base_url=server.base_url, api_key="key", http_client=whiflash_sdk.http_client())
    ways = {
        "async": lambda: ran(main()),
        "repeated, below": lambda: below.chat.completions.create(**ASKED),
        "raw": lambda: wrap(client).with_raw_response.completions.create(model="m", prompt="x"),
        "create": lambda: wrap(client).chat.completions.create(**ASKED),
    }
    with pytest.warns(whiflash_sdk.UnsupportedServerWarning) as said:
        ways.get(way, lambda: client.chat.completions.create(**ASKED))()
    assert [one.filename for one in said] == [__file__]


def test_what_is_nearer_to_the_call_says_who_asks(client: OpenAI, server: FakeServer) -> None:
    wrap(client, agent="client")
    ask(client)
    with agent("outer"):
        ask(client)
        with agent("inner"):
            ask(client)
            ask(client, extra_body=Hints(agent="call").extra_body())
            ask(client, extra_body=Hints(agent=None).extra_body())
            unread: Any = {"model": "m", "prompt": "x", "extra_body": {"agent-id": "unread"}}
            client.with_options(max_retries=0).completions.create(**unread)
    ask(wrap(client.with_options(), agent="client", hints=Hints(agent="of the hints")))
    assert server.said("agent") == ["client", "outer", "inner", "call", None, "inner", "of the hints"]


def test_a_function_is_asked_at_every_call(client: OpenAI, server: FakeServer) -> None:
    long = "path/" * 20 + "end"
    names = iter(["caf\ud8e9", None, long, "never"])
    told: Callable[[], str | None] = lambda: next(names)  # noqa: E731
    wrap(client, agent=told)
    for _ in range(3):
        ask(client)
    with agent("block"):
        ask(client)
    assert server.said("agent") == ["caf?", None, long[-64:], "block"]
    assert next(names) == "never", "nobody is asked where a name is said"


def test_a_block_predicts_for_every_route(client: OpenAI, server: FakeServer) -> None:
    """A call's own prediction is left as it is, and bytes that are no text end no step."""
    own: Any = {"type": "content", "content": [{"type": "text", "text": "mine"}]}
    wrap(client)
    with predict("block"):
        ask(client)
        list(ask(client, stream=True))
        client.completions.create(model="m", prompt="x")
        with predict(b"caf\xe9 = 1".decode(errors="surrogateescape")):
            ask(client)
        with predict(None):
            ask(client)
        ask(client, prediction=own)
        client.completions.create(model="m", prompt="x", extra_body={"prediction": own})
    ask(client)
    block = {"type": "content", "content": "block"}
    found = [body.get("prediction") for body in server.bodies]
    assert found == [block, block, block, {**block, "content": "caf? = 1"}, None, own, own, None]


def test_what_is_assumed_needs_no_more_than_what_differs(client: OpenAI, server: FakeServer) -> None:
    """Predictions go out as they do to a server that answers; fields that are set hold."""
    known = Capabilities(version=1, prediction_tokens=0)
    for given in (True, Capabilities(version=1, tool_call_parser="hermes"), known):
        with predict("text"):
            ask(wrap(client.with_options(), agent=lambda: "mine", capabilities=given))
    assert server.said("agent") == ["mine"] * 3
    assert ["prediction" in body for body in server.bodies] == [True, True, False]
    wrap(client, capabilities=Capabilities(version=1)).responses.create(model="m", input="x")
    assert server.routed()[-1]
    assert ROUTE not in server.paths
