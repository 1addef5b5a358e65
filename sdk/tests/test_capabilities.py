"""Whether a server routes: how long an answer holds, whose it is, what a probe costs, how it is overridden."""

import asyncio
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from fake_server import ASKED, CAPABILITIES, ROUTE, Clock, FakeServer, ask, serving
from openai import AsyncOpenAI, AzureOpenAI, OpenAI

import whiflash_sdk
from whiflash_sdk import Capabilities, Hints, UnsupportedServerError, UnsupportedServerWarning, wrap
from whiflash_sdk.capabilities import async_ask
from whiflash_sdk.identity import OfClient


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsupportedServerWarning)
        yield


def test_the_document_is_read_and_not_completed(client: OpenAI, server: FakeServer, clock: Clock) -> None:
    """Fields that it leaves out are missing on the server."""
    known = {name: value for name, value in CAPABILITIES.items() if name != "a_later_field"}
    assert whiflash_sdk.capabilities(client) == Capabilities(**known)
    server.capabilities, clock.seconds = {"version": 1}, 301
    found = whiflash_sdk.capabilities(client)
    assert found is not None
    assert found.assumed() == found == Capabilities(version=1)


FAILURES: list[Any] = [500, 503, 429, 401, 403, 405, b"", b"<p>soon</p>", b'{"ok":']


@pytest.mark.parametrize(
    ("answers", "routed", "asked"),
    [
        *([((0, failure), (1.5, 200)), [False, True], 2] for failure in FAILURES),
        (((0, 404), (299, 200), (301, 200)), [False, False, True], 2),
        (((0, 200), (301, 404)), [True, False], 2),
        (((0, 200), (301, 503)), [True, True], 2),
    ],
)
def test_an_answer_holds_for_its_time_and_no_longer(
    client: OpenAI, server: FakeServer, clock: Clock, answers: Any, routed: list[bool], asked: int
) -> None:
    """A failure is asked again soon, and does not undo a yes."""
    wrap(client)
    for clock.seconds, answer in answers:
        server.capabilities = answer if isinstance(answer, bytes) else CAPABILITIES
        server.capabilities_status = 200 if isinstance(answer, bytes) else answer
        ask(client)
    assert (server.routed(), server.paths.count(ROUTE)) == (routed, asked)


def test_a_dead_gateway_is_not_asked_with_every_request(client: OpenAI, server: FakeServer, clock: Clock) -> None:
    server.capabilities_status = 503
    wrap(client)
    for _ in range(1200):  # ten minutes, a request every half second
        whiflash_sdk.capabilities(client)
        clock.seconds += 0.5
    assert 6 + 8 <= server.paths.count(ROUTE) <= 6 + 10  # 1, 2, 4, 8, 16, 32 seconds, then every minute


SECRETS = "Authorization X-Api-Key api-key apikey Ocp-Apim-Subscription-Key X-Auth-Token CF-Access-Client-Secret Cookie"
OTHERS = "X-Request-ID traceparent Idempotency-Key X-Author"


@pytest.mark.parametrize("name", [*SECRETS.split(), "OpenAI-Organization", *OTHERS.split()])
def test_headers_that_authenticate_count_and_others_do_not(server: FakeServer, name: str) -> None:
    probes = 1 if name in OTHERS.split() else 2
    with OpenAI(base_url=server.base_url, api_key="k") as client:
        wrap(client)
        for value in ("a", "a", "b"):
            ask(client.with_options(default_headers={name: value}))
        assert server.paths.count(ROUTE) == probes
        client._client.cookies.set("sticky", "1")  # balancers do
        ask(client.with_options(default_headers={name: "b"}))
        assert server.paths.count(ROUTE) == probes
        for value in ("b", "c"):
            ask(client, extra_headers={name: value})
    assert server.paths.count(ROUTE) == 2 * probes - 1, "a call has its own key"


def test_a_key_in_the_query_counts_and_a_version_does_not(server: FakeServer) -> None:
    with OpenAI(base_url=server.base_url, api_key="k") as client:
        for query in ({"api-version": "1"}, {"api-version": "2"}, {"subscription-key": "a"}):
            ask(wrap(client.with_options(default_query=query)))
    assert server.paths.count(ROUTE) == 2


@pytest.mark.parametrize("path", ["https://elsewhere.example/whiflash/capabilities", "/moved"])
def test_a_probe_follows_no_redirect(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any, path: str
) -> None:
    """Another host would get the keys: `httpx` takes `Authorization` off by itself, and nothing else."""
    with serving() as other:
        server.capabilities_moved_to = path.replace("https://elsewhere.example", other.url)
        keys = {"api-key": "sk-azure", "Ocp-Apim-Subscription-Key": "sk-gateway"}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ask(wrap(client).with_options(default_headers=keys))

        async def main() -> None:
            await wrap(async_client).with_options(default_headers=keys).chat.completions.create(**ASKED)

        ran(main())
        assert other.paths == []
    assert "/moved" not in server.paths
    assert server.routed() == [False, False]
    assert "answered 307" in str(said[0].message)


def test_keys_that_are_made_anew_for_every_request_are_one_clients(server: FakeServer) -> None:
    keys = iter(f"k{number}" for number in range(100))
    with OpenAI(base_url=server.base_url, api_key=lambda: next(keys)) as client:
        wrap(client)
        for _ in range(3):
            ask(client)
    assert server.routed() == [True] * 3
    assert server.paths.count(ROUTE) == 1


@pytest.mark.parametrize("setting", ["azure_ad_token_provider", "azure_ad_token"])
def test_tokens_of_two_makers_are_two_askers(server: FakeServer, setting: str) -> None:
    """Azure's are in no header until a request is sent: one that is refused says nothing of the other."""
    server.capabilities_key = "good"
    azure: Any = {"base_url": server.base_url, "api_version": "1"}
    for token, routes in (("bad", False), ("good", True), ("bad", False)):
        given: Any = token if setting == "azure_ad_token" else partial(str, token)
        with AzureOpenAI(**azure, **{setting: given}) as client, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask(wrap(client))
        assert server.routed()[-1] is routes


@pytest.mark.parametrize("below", [False, True])
def test_a_probe_leaves_no_connection_of_its_event_loop(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, below: bool
) -> None:
    """Nor does it fail with HTTPX before 0.25: an answer's status was raised, or nothing returned."""
    sent: dict[str, str] = {}
    raised = httpx.Response.raise_for_status
    monkeypatch.setattr(httpx.Response, "raise_for_status", lambda answer: raised(answer) and None)

    async def main() -> None:
        async def note(request: Any) -> None:
            sent[request.url.path] = request.headers["connection"]

        inner = httpx.AsyncClient(event_hooks={"request": [note]})
        http = whiflash_sdk.async_http_client(inner) if below else inner
        async with AsyncOpenAI(base_url=server.base_url, api_key="key", http_client=http) as client:
            await (client if below else wrap(client)).chat.completions.create(**ASKED)

    asyncio.run(main())
    assert sent == {ROUTE: "close", "/v1/models": "close", "/v1/chat/completions": "keep-alive"}
    assert server.routed() == [True]


def test_a_probe_may_take_what_the_request_may_and_no_more_than_its_own_bound(client: OpenAI) -> None:
    told: list[dict[str, float]] = []

    def hook(request: Any) -> None:
        if request.url.path == ROUTE:
            told.append(request.extensions["timeout"])

    client._client.event_hooks["request"] = [hook]
    wrap(client)
    bound: float = vars(sys.modules["whiflash_sdk.capabilities"])["PROBE_SECONDS"]
    limits = [50.0, openai.Timeout(None, connect=40.0), 2 * bound, None]
    for number, timeout in enumerate(limits):
        ask(client.with_options(default_headers={"X-Api-Key": f"client {number}"}, timeout=timeout))
    client.chat.completions.create(**ASKED, timeout=30.0)
    phases = ("connect", "read", "write", "pool")
    whole = dict.fromkeys(phases, bound)
    assert told == [dict.fromkeys(phases, 50.0), {**whole, "connect": 40.0}, whole, whole, dict.fromkeys(phases, 30.0)]


@contextmanager
def asking(client: OpenAI, server: FakeServer) -> Iterator[Future[Any]]:
    """A thread asks a server that is silent until the block ends."""
    known = server.paths.count(ROUTE)
    server.silent.set()
    with ThreadPoolExecutor(1) as pool:
        try:
            asked = pool.submit(whiflash_sdk.capabilities, client)
            while server.paths.count(ROUTE) == known and not asked.done():
                time.sleep(0.01)
            yield asked
        finally:
            server.silent.clear()


def test_who_waits_for_anothers_probe_waits_as_long_as_it_would_itself(client: OpenAI, server: FakeServer) -> None:
    with asking(wrap(client), server):
        assert whiflash_sdk.capabilities(client.with_options(timeout=0.01)) is None
        assert server.paths.count(ROUTE) == 1
    assert whiflash_sdk.capabilities(client) is not None


def test_nobody_waits_for_a_known_answer_to_be_renewed(client: OpenAI, server: FakeServer, clock: Clock) -> None:
    ask(wrap(client))
    clock.seconds = 301
    with asking(client, server) as asked:
        ask(client)  # would hang until `silent` ends
        assert server.routed() == [True, True]
        assert not asked.done()


def test_event_loops_that_come_and_go(server: FakeServer, clock: Clock) -> None:
    server.capabilities_status = 503

    async def main() -> None:
        async with AsyncOpenAI(base_url=server.base_url, api_key="key") as client:
            wrap(client)
            await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(2)))

    asyncio.run(main())
    server.capabilities_status = 200
    clock.seconds = 2
    asyncio.run(main())
    assert server.routed() == [False, False, True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_does_not_wait_for_its_parents_probe(client: OpenAI, server: FakeServer) -> None:
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe()

    def child() -> None:
        with OpenAI(base_url=server.base_url, api_key="key") as own:
            there.send(whiflash_sdk.capabilities(own))

    with asking(client, server):
        process = context.Process(target=child)
        process.start()
        while server.paths.count(ROUTE) < 2 and process.is_alive():
            process.join(0.01)
    assert here.recv() is not None
    process.join()


@pytest.mark.parametrize(("value", "is_hinted"), [("1", False), ("off", True)])
def test_the_environment_is_above_the_code(
    client: OpenAI, server: FakeServer, monkeypatch: pytest.MonkeyPatch, value: str, is_hinted: bool
) -> None:
    monkeypatch.setenv("WHIFLASH_SDK_DISABLE", value)
    ask(wrap(client))
    assert (ROUTE in server.paths) == is_hinted
    ask(wrap(client.with_options(), capabilities=Capabilities(version=1)))
    assert server.routed() == [is_hinted] * 2
    monkeypatch.setenv("WHIFLASH_SDK_DISABLE", "maybe")
    with pytest.raises(ValueError, match=r"WHIFLASH_SDK_DISABLE.*maybe"):
        wrap(client)


def test_a_probe_that_breaks_in_the_users_own_code_breaks_nothing(
    client: OpenAI, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And instrumentations record none of it."""
    untraced: list[str] = []

    @contextmanager
    def suppress() -> Iterator[None]:
        untraced.append("begun")
        yield
        untraced.append("ended")

    def hook(request: Any) -> None:
        if request.url.path == ROUTE:
            untraced.append(ROUTE)
            raise KeyError("a hook of the user's")

    tools = SimpleNamespace(suppress_instrumentation=suppress)
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.utils", tools)
    client._client.event_hooks["request"] = [hook]
    ask(wrap(client))
    assert server.routed() == [False]
    assert untraced == ["begun", ROUTE, "ended"]


def test_the_log_tells_of_probes_and_of_no_secret(
    server: FakeServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("whiflash_sdk").handlers)
    url = server.base_url.replace("http://", "http://user:hunter2@")
    server.capabilities_key = "sk-other"
    with caplog.at_level(logging.DEBUG, "whiflash_sdk"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with OpenAI(base_url=url, api_key="sk-secret", default_headers={"X-Key": "hush"}) as client:
            ask(wrap(client))
            with pytest.raises(UnsupportedServerError) as raised:
                ask(wrap(client.with_options(), strict=True))
        server.capabilities_key = ""
        with OpenAI(base_url=server.base_url, api_key="sk-secret") as client:
            ask(wrap(client))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("whiflash_sdk")]
    assert "answered 401" in lines[0]
    assert "routes" in lines[-1]
    everything = " ".join([*lines, str(raised.value), *(str(one.message) for one in said)])
    for secret in ("sk-secret", "hunter2", "hush"):
        assert secret not in everything
        assert secret not in repr(vars(sys.modules["whiflash_sdk.capabilities"]))


def test_what_is_wrong_is_said_once_a_server_and_reason(client: OpenAI, server: FakeServer, clock: Clock) -> None:
    wrap(client)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for status in (503, 503, 404, 404):
            server.capabilities_status = status
            ask(client)
            clock.seconds += 1000
    assert [str(one.message).split("; ")[0].split(" answered ")[1] for one in said] == ["503", "404"]
    with pytest.raises(UnsupportedServerError, match=r"answered 404.*asked again in 300"):
        ask(wrap(client.with_options(), strict=True))


def test_switched_off_nothing_of_ours_goes_out(client: OpenAI, server: FakeServer) -> None:
    extra = Hints(off=True).extra_body({"custom_params": {"a": 1}, "top_k": 3})
    wrap(client, capabilities=False, strict=True, tenant="acme")
    client.chat.completions.create(**ASKED, extra_body=extra)
    assert server.bodies == [{**ASKED, "custom_params": {"a": 1}, "top_k": 3}]
    assert ROUTE not in server.paths


PHASES = {"connect": 30.0, "read": None, "write": None, "pool": None}
"""Timeouts of another version of the transport."""


@pytest.mark.parametrize("timeout", [30.0, (30.0, 60.0), (30.0,) * 4, SimpleNamespace(as_dict=lambda: PHASES)])
def test_every_way_to_write_a_timeout_is_read(client: OpenAI, timeout: Any) -> None:
    client.timeout = timeout
    assert whiflash_sdk.capabilities(client) is not None


def test_a_silent_server_takes_the_clients_time(
    client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any
) -> None:
    server.silent.set()
    assert whiflash_sdk.capabilities(client.with_options(timeout=0.05)) is None
    vars(sys.modules["whiflash_sdk.capabilities"])["_servers"].clear()
    server.paths.clear()

    async def main() -> None:
        mine = wrap(async_client).with_options(timeout=0.2)
        found = await asyncio.gather(*(whiflash_sdk.async_capabilities(mine) for _ in range(3)))
        assert found == [None] * 3

    ran(main())
    assert server.paths.count(ROUTE) <= 1  # none where the time was over before the server was reached


def test_a_silent_list_is_asked_for_again_later(async_client: AsyncOpenAI, clock: Clock, ran: Any) -> None:
    async def main() -> None:
        asker, seconds = OfClient(async_client), {"/v1/models": 3600.0}
        await async_ask(asker, model="m")
        async_client._client.event_hooks["request"] = [lambda sent: asyncio.sleep(seconds.get(sent.url.path, 0))]
        clock.seconds = 301
        found = await async_ask(asker, 0.2, "m")
        assert (found.alone, found.is_due("m")) == (True, False), "what the list said before holds"
        found.alone, clock.seconds, seconds[ROUTE] = None, 1e6, 3600.0
        assert "gave no answer in time" in (await async_ask(asker, 0.2, "m")).trouble

    ran(main())


def test_who_starts_together_asks_once(client: OpenAI, async_client: AsyncOpenAI, server: FakeServer, ran: Any) -> None:
    wrap(client), wrap(async_client, agent="a")
    server.capabilities_seconds = 0.1
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, [client] * 8))
    assert server.paths.count(ROUTE) == 1
    vars(sys.modules["whiflash_sdk.capabilities"])["_servers"].clear()

    async def main() -> None:
        await asyncio.gather(*(async_client.chat.completions.create(**ASKED) for _ in range(8)))

    ran(main())
    assert server.paths.count(ROUTE) == 2
    assert server.routed() == [True] * 16


def test_a_task_that_gives_up_leaves_the_question_to_the_next(
    async_client: AsyncOpenAI, server: FakeServer, ran: Any
) -> None:
    server.silent.set()

    async def main() -> list[Any]:
        asking = [asyncio.create_task(whiflash_sdk.async_capabilities(async_client)) for _ in range(3)]
        while not server.paths:
            await asyncio.sleep(0.01)
        asking[0].cancel()
        server.silent.clear()
        return await asyncio.gather(*asking, return_exceptions=True)

    first, *others = ran(main())
    assert isinstance(first, asyncio.CancelledError)
    assert all(isinstance(found, Capabilities) for found in others)
    assert server.paths.count(ROUTE) == 2
