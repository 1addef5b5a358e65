"""The pair of servers that these tests share: plain decoding, and ours with the same arguments."""

from collections.abc import Iterator

import pytest
from openai import OpenAI
from server_host import Server, ServerHost
from tiny_models import CHAT_TEMPLATE, served_pair, tiny_target
from whiflash_sdk import wrap

from whiflash_lab.servers import free_port

Pair = tuple[Server, Server]


@pytest.fixture(scope="package")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory, host: ServerHost, grpc_port: int) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_target(root / "other", seed=3, peaked=True)
    # SGLang finds the parser of `auto` by what the template shows.
    template = root / "template.jinja"
    template.write_text(CHAT_TEMPLATE + "{# <function=f><parameter=p> #}")
    shared = ["--tool-call-parser", "auto", "--reasoning-parser", "auto", "--chat-template", str(template)]
    shared += ["--enable-priority-scheduling", "--default-priority-value", "0", *served_pair(root)]
    plain = shared[: shared.index("--speculative-algorithm")]
    ours = [*shared, "--grpc-port", str(grpc_port)]
    with host.running(*plain) as first, host.running(*ours) as second:
        yield first, second


@pytest.fixture(scope="package")
def stock(pair: Pair) -> Server:
    """Without WHIFLASH."""
    return pair[0]


@pytest.fixture(scope="package")
def server(pair: Pair) -> Server:
    """Ours, under `auto`."""
    return pair[1]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    """Asks for full traces."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=None) as made:
        yield wrap(made, strict=True, trace="full")
