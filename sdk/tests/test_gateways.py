"""Several servers at one address: hints go to the model that reads them, and what is refused is asked without them."""

import warnings
from typing import Any

import openai
import pytest
from fake_server import ASKED, ROUTE, Clock, FakeServer, ask
from openai import AsyncOpenAI, OpenAI

from whiflash_sdk import Capabilities, Hints, UnsupportedServerError, UnsupportedServerWarning, predict, wrap
from whiflash_sdk.capabilities import KEPT_SECONDS

pytestmark = pytest.mark.filterwarnings("ignore::whiflash_sdk.UnsupportedServerWarning")


@pytest.mark.parametrize("models", [["tiny", "other"], ["other"], [], ["tiny", "other", "tiny"]])
def test_a_gateways_other_models_get_no_hints(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any, models: list[str]
) -> None:
    server.models = models
    asked: Any = {**ASKED, "model": "other"}
    wrap(client, hints=Hints(off=True)), wrap(async_client)
    with warnings.catch_warnings(record=True) as said, predict("mine"):
        warnings.simplefilter("always")
        for _ in range(2):
            client.chat.completions.create(**asked)
        list(client.chat.completions.create(**asked, stream=True))
        client.chat.completions.create(**{**ASKED, "model": "tiny"})
        ran(async_client.chat.completions.create(**asked))
    assert server.routed() == [False, False, False, True, False]
    assert server.bodies[0] == asked
    told = [str(one.message) for one in said if one.category is UnsupportedServerWarning]
    assert [message.split("; ")[0] for message in told] == [
        f"{server.url}{ROUTE} answers for the model 'tiny', and this request is for 'other'"
    ]
    assert [server.paths.count(path) for path in (ROUTE, "/v1/models")] == [1, 1]
    with pytest.raises(UnsupportedServerError, match=r"'tiny'.*'other'"):
        wrap(client.with_options(), strict=True).chat.completions.create(**asked)


def test_a_server_that_lists_one_model_gets_hints_under_any_name(client: OpenAI, server: FakeServer) -> None:
    """SGLang answers to any name: `default`, or the model's name where a path is served."""
    wrap(client).chat.completions.create(**{**ASKED, "model": "tiny"})
    assert "/v1/models" not in server.paths
    for model in ("default", "default", "tiny"):
        client.chat.completions.create(**{**ASKED, "model": model})
    assert server.routed() == [True] * 4
    assert [server.paths.count(path) for path in (ROUTE, "/v1/models")] == [1, 1]


def test_a_list_that_fails_once_is_asked_for_again_soon(client: OpenAI, server: FakeServer, clock: Clock) -> None:
    wrap(client)
    for models in (None, ["tiny"]):
        server.models = models
        client.chat.completions.create(**{**ASKED, "model": "default"})
        clock.seconds += 2
    assert server.routed() == [False, True]
    server.models = None
    for model in ("tiny", "default"):  # the first asks for no list
        clock.seconds += 2 * KEPT_SECONDS
        client.chat.completions.create(**{**ASKED, "model": model})
    assert server.routed()[-1], "what the list said before holds while it fails"


def test_a_models_adapters_are_no_other_models(client: OpenAI, server: FakeServer) -> None:
    server.models = ["tiny", {"id": "legal", "parent": "tiny"}]
    wrap(client)
    for model in ("tiny:legal", "legal", "default"):
        client.chat.completions.create(**{**ASKED, "model": model})
    assert server.routed() == [True] * 3


def test_capabilities_given_for_a_model_hold_for_it_alone(client: OpenAI, server: FakeServer) -> None:
    wrap(client, capabilities=Capabilities(version=1, model="mine"))
    for model in ("mine", "other"):
        client.chat.completions.create(**{**ASKED, "model": model})
    assert server.routed() == [True, False]


REFUSALS = [
    (400, "Unrecognized request argument supplied: {field}"),
    (400, "body: additional properties are not allowed ('{field}')"),
    (422, "[{{'type': 'extra_forbidden', 'loc': ['body', '{field}']}}]"),
]


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("field", ["custom_params", "prediction", "cache_salt"])
def test_a_request_that_is_refused_for_our_fields_is_repeated_without_them(
    client: OpenAI, server: FakeServer, clock: Clock, refusal: tuple[int, str], field: str
) -> None:
    """After a failover another server answers, and what is known of the first holds for five minutes."""
    server.refuses, server.refusal = {field}, refusal
    own = {"top_k": 3} if field == "custom_params" else {"top_k": 3, "custom_params": {}}
    with warnings.catch_warnings(record=True) as said, predict("mine"):
        warnings.simplefilter("always")
        answer = wrap(client, tenant="acme").chat.completions.create(**ASKED, extra_body=own)
        assert answer.choices[0].message.content
        assert server.bodies[1] == {**ASKED, "top_k": 3}
        list(client.chat.completions.create(**ASKED, stream=True))
        client.completions.create(model="m", prompt="x")
    assert server.routed() == [True, False, False, False]
    assert [f"{field} was refused" in str(one.message) for one in said] == [True]
    server.refuses = set()  # the first one is back
    clock.seconds = 301
    ask(client)
    assert server.routed()[-1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("capabilities", [None, True, Capabilities(version=1, routes=("responses",))])
def test_refused_streams_and_async_requests_are_repeated_too(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any, stream: bool, capabilities: Any
) -> None:
    server.refuses = {"custom_params"}
    told: dict[str, Any] = {**ASKED, "stream": stream}

    async def main() -> None:
        answer: Any = await wrap(async_client, capabilities=capabilities).chat.completions.create(**told)
        assert not stream or len([chunk async for chunk in answer]) > 1

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ran(main())
        view = wrap(client, capabilities=capabilities).chat.completions.with_raw_response
        assert view.create(**told).http_response.status_code == 200
        answer: Any = client.responses.create(model="m", input="x", stream=stream)
        assert not stream or [event.type for event in answer][-1] == "response.completed"
    assert said
    assert server.routed()[:2] == [True, False]
    assert not any(server.routed()[2:]) or capabilities is not None


def test_other_refusals_are_raised_as_they_are(client: OpenAI, server: FakeServer) -> None:
    server.refuses, server.refusal = {"messages"}, (400, "the prompt is too long")
    with pytest.raises(openai.BadRequestError, match="too long"):
        ask(wrap(client))
    assert len(server.bodies) == 1
    own = {"custom_params": {"a": 1}}
    server.refuses, server.refusal = {"custom_params"}, (400, "custom_params.a: must be text")
    with pytest.raises(openai.BadRequestError, match="must be text"):
        client.chat.completions.create(**ASKED, extra_body=own)
    assert server.bodies[2] == {**ASKED, **own}
    server.refuses = set()
    ask(client)
    assert server.routed()[-1]  # the caller's own field was refused, which says nothing about ours


def test_a_hint_that_is_refused_takes_hints_from_no_other_call(client: OpenAI, server: FakeServer) -> None:
    """The server reads hints and refuses what one call says, so it is not forgotten."""
    server.refuses, server.refusal = {"custom_params"}, (400, "custom_params.whiflash.spans[0].begin: is too long")
    with pytest.warns(UnsupportedServerWarning, match="refuses what custom_params says"):
        ask(wrap(client, tenant="acme"))
    server.refuses = set()
    ask(client)
    assert server.routed() == [True, False, True]
    assert [body["cache_salt"] for body in server.bodies] == ["acme"] * 3, "a tenant is no hint"


def test_strict_repeats_nothing(client: OpenAI, server: FakeServer) -> None:
    server.refuses = {"custom_params"}
    with pytest.raises(openai.BadRequestError, match="custom_params"):
        ask(wrap(client, strict=True))
    assert server.routed() == [True]
