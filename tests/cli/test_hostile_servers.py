"""Servers that answer anything: commands end with a sentence, in bounded time, and show no password."""

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

import httpx
import pytest
from pydantic import BaseModel
from typer.testing import CliRunner, Result

from whiflash_sglang.cli import echo
from whiflash_sglang.cli.app import app
from whiflash_sglang.errors import ServerRefusedError, WhiflashError
from whiflash_sglang.files import hosts
from whiflash_sglang.files.hosts import ServerState, ask

ODD = (None, "text", [], [[1]], {}, {"a": {}}, True, -1, 0.5, 1e-320, 1e300, 2**70, 10**9)
"""Values that somebody may send in place of any."""
READERS = (("report",), ("report", "--json"), ("top", "--once"), ("policy",))
Serve = Callable[[Callable[[str], Any]], None]


def sample(form: Any) -> Any:
    """A right value of a type, with every field of every model in it."""
    if isinstance(form, type) and issubclass(form, BaseModel):
        return {name: sample(field.annotation) for name, field in form.model_fields.items()}
    inside = [part for part in get_args(form) if part not in (type(None), ...)]
    match get_origin(form):
        case origin if origin is dict:
            return {"ar": sample(inside[1])}
        case origin if origin is list:
            return [sample(inside[0])]
        case origin if origin is tuple:
            return [sample(part) for part in inside]
        case origin if origin is Annotated or inside:
            return sample(inside[0])
    return {str: "auto", float: 2.0, bool: True}.get(form, 2)


def spoiled(value: Any) -> Iterator[Any]:
    """The value with everything in it, and itself, replaced by every odd value."""
    yield from ODD
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for odd in spoiled(value[key]):
            copy = value.copy()
            copy[key] = odd
            yield copy


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Have all clients get answers by path: bytes, or what is sent as JSON."""
    client = httpx.Client

    def begin(answer: Callable[[str], Any]) -> None:
        def sent(request: httpx.Request) -> httpx.Response:
            body = answer(request.url.path)
            return httpx.Response(200, content=body if isinstance(body, bytes) else json.dumps(body))

        transport = httpx.MockTransport(sent)
        monkeypatch.setattr(httpx, "Client", lambda **given: client(**{**given, "transport": transport}))

    return begin


def run(*words: str, url: str = "http://host:1") -> Result:
    """The command's end, which is no bug: it did what it should, or said why not."""
    ended = CliRunner().invoke(app, [*words, "--echo" if words[0] == "check" else "--url", url])
    if not isinstance(ended.exception, WhiflashError | SystemExit | None):
        raise AssertionError(words) from ended.exception
    return ended


def test_a_state_of_another_shape_is_a_sentence(serve: Serve) -> None:
    """In every field that commands read."""
    now: dict[str, Any] = {}
    serve(lambda path: {"model": "tiny"} if path.endswith("capabilities") else now["state"])
    now["state"] = whole = sample(ServerState)
    assert all(run(*words).exception is None for words in READERS)
    for number, now["state"] in enumerate(spoiled(whole)):
        ended = run(*READERS[number % len(READERS)])
        assert "inf" not in ended.stdout.lower(), now["state"]


def test_replicas_may_hold_terabytes(serve: Serve) -> None:
    whole = {**sample(ServerState), "memory": {"draft_kv": 3 << 40}}
    serve(lambda path: {"model": "tiny"} if path.endswith("capabilities") else whole)
    assert "3072.0 GiB" in run("top", "--once").stdout


BODIES = (b"[" * 100_000, b"{" * 9, b"\xff\xfe", b"", b"NaN", b"null", b'{"policy": 1e999}', b"5")


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_what_is_no_json_of_ours_is_a_sentence(serve: Serve, body: bytes) -> None:
    serve(lambda _: body)
    for words in (*READERS, ("check",)):
        assert "without the expected JSON" in str(run(*words).exception)


def test_an_answer_without_end_is_not_read() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65536

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=endless()))
    for timeout, said in ((60.0, "longer than 16 MiB"), (1e-9, "has not answered")):
        with (
            httpx.Client(transport=transport, timeout=timeout) as client,
            pytest.raises(ServerRefusedError, match=said),
        ):
            ask(client, "http://host:1", "/whiflash/state", ServerState)


def test_check_echo_reads_what_any_server_sends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        "/whiflash/capabilities": hosts.ServedArms,
        "/server_info": hosts.ServedType,
        "/tokenize": hosts.Tokenized,
        "/generate": echo.Generated,
    }
    for name, few in (("AT_ONCE", 1), ("DRAFTS", 1), ("RESUMED", 0)):
        monkeypatch.setattr(echo, name, few)
    whole = {path: sample(shape) for path, shape in shapes.items()}
    trace = whole["/generate"]["meta_info"]["whiflash"]
    for unread in ("arms", "sources", "reasons", "cached", "notes", "text"):
        del trace[unread]
    now = dict(whole)
    serve(now.__getitem__)
    assert run("check").exit_code == 0
    for path, right in whole.items():
        for now[path] in spoiled(right):
            run("check")
        now[path] = right


def test_no_password_is_printed(serve: Serve) -> None:
    """In answers and errors."""
    right = sample(ServerState) | {"model": "tiny"}
    bodies = [right, {}]
    serve(lambda _: bodies[0])
    for _ in range(2):
        for words in (*READERS, ("top", "--once", "--json"), ("check",)):
            for url in ("http://user:secret@host:1/v1/", "http://user:a/secret@host:1", "u:secret@host:1"):
                ended = run(*words, url=url)
                assert "secret" not in f"{ended.output} {ended.exception}", (words, url)
        bodies.reverse()


def test_a_dead_servers_password_is_in_no_error() -> None:
    for words in (*READERS, ("check",)):
        for url in ("http://u:secret@127.0.0.1:1", "u:secret@host", "http://u:secret@[::"):
            said = str(run(*words, url=url).exception)
            assert said.strip()
            assert "secret" not in said, (words, url)
