"""How long a client's schema of a tool stops a neighbour's stream: `python scripts/schema_pauses.py --markdown FILE`.

One client streams; another sends two chats with a tool whose schema is among the worst that are known
(`tests/structure/worst_schemas.py`). The second chat's answer has already begun a call of the tool. The figure is the
longest time between two chunks of the stream, until a second after the second chat. A prompt that holds a schema is a
long prefill, which plain servers pay too.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import outcome

from whiflash_sglang.checkpoints.manifest import embedded_bundle, load_manifest
from whiflash_sglang.cli.serve import server_arguments
from whiflash_sglang.serving import Server

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "structure"))

from worst_schemas import WORST

ASK = {"role": "user", "content": "Say in one word what a tool is."}
BEGUN = {"role": "assistant", "content": '<tool_call>\n{"name": "find", "arguments": {'}
TRIVIAL: dict[str, Any] = {"type": "object", "properties": {"path": {"type": "string"}}}
SECONDS = 1.0
"""Behind a request's end in which its neighbour is still watched."""


class Neighbour:
    """A stream without an end, and when its chunks came."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.times: list[float] = []

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "Count upwards from one, in words."}],
            "stream": True,
            "max_tokens": 2000,
            "ignore_eos": True,
        }
        while True:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    self.times.append(time.monotonic())

    def longest(self, since: float) -> float:
        """Seconds between two chunks since then, at most."""
        times = [since, *(at for at in self.times if at >= since), time.monotonic()]
        return max(later - at for at, later in pairwise(times))


async def pauses(url: str, schemas: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Longest pause under each schema; None: the server refuses the request."""
    found: dict[str, float | None] = {}
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        neighbour = Neighbour(client)
        stream = asyncio.create_task(neighbour.run())
        while len(neighbour.times) < 20:
            await asyncio.sleep(0.1)
        for name, schema in schemas.items():
            since, refused = time.monotonic(), False
            for messages in ([ASK], [ASK, BEGUN]):
                answer = await client.post("/v1/chat/completions", json=request(messages, schema))
                refused |= answer.status_code == 400
                if not refused:
                    answer.raise_for_status()
            await asyncio.sleep(SECONDS)
            found[name] = None if refused else neighbour.longest(since)
            print(f"{name}: {'refused' if refused else f'{found[name]:.2f} s'}", file=sys.stderr, flush=True)
        stream.cancel()
        with suppress(asyncio.CancelledError):
            await stream
    return found


def request(messages: list[dict[str, str]], schema: dict[str, Any]) -> dict[str, Any]:
    """A chat with one tool; an answer that has begun is continued."""
    tool = {"type": "function", "function": {"name": "find", "parameters": schema}}
    return {
        "model": "m",
        "messages": messages,
        "tools": [tool],
        "tool_choice": "auto",
        "max_tokens": 16,
        "ignore_eos": True,
        "continue_final_message": messages[-1] is BEGUN,
    }


def table(plain: dict[str, float | None], ours: dict[str, float | None]) -> str:
    rows = [f"| {name} | {cell(plain[name])} | {cell(ours[name])} |" for name in plain]
    return "\n".join(
        ["| schema of the tool | plain server, s | WHIFLASH, s |", "| --- | ---: | ---: |", *rows]
    )


def cell(seconds: float | None) -> str:
    """Seconds, or that both requests were refused because their schema exceeds the context."""
    return "refused, too long" if seconds is None else f"{seconds:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", type=Path, help="write the report here")
    given = parser.parse_args(arguments)
    schemas = {"none worth the name": TRIVIAL, **WORST}
    found = []
    for ours in (False, True):
        flags = ["--tool-call-parser", "hermes", "--context-length", "8192"]
        line = (
            server_arguments([*flags, "--whiflash-router", "auto"])
            if ours
            else plainly(server_arguments(flags))
        )
        with Server(line) as server:
            found.append(asyncio.run(pauses(server.base_url, schemas)))
    print(table(*found))
    if given.markdown is not None:
        read = __doc__.split("\n\n")[1].replace("\n", " ").strip()
        outcome.write(
            given.markdown, "The longest pause of a neighbour's stream, by schema", read, table(*found)
        )


def plainly(line: Sequence[str]) -> list[str]:
    """The command line of a server without WHIFLASH, which shows tools to its model in the same words."""
    at = line.index("--speculative-algorithm")
    template = load_manifest(embedded_bundle()).chat_template
    return [*line[:at], *line[at + 2 :], "--chat-template", str(embedded_bundle() / str(template))]


if __name__ == "__main__":
    main()
