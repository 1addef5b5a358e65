"""Sends requests to a server in a closed loop, with streamed answers, and times them."""

import asyncio
import codecs
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from whiflash_lab.bench.cells import Answer, Load
from whiflash_lab.bench.prompts import Prompt
from whiflash_sglang.errors import WhiflashError
from whiflash_sglang.files.disk import MOST_BYTES
from whiflash_sglang.files.jsonl import NOT_AS_WRITTEN, read_json

MODEL = "bench"
ANSWER_SECONDS = 3600.0
"""Seconds until a request times out. It is long, because a server that ends closes its connections at once."""


class RequestError(WhiflashError):
    """A server refused or broke off a request."""


class RefusedError(RequestError):
    """The server does not accept a request, which is too long for the context, or malformed."""


def error_of(prompt: str, status: int, text: str) -> RequestError:
    """Return the error of a request that a server answered with this status and text."""
    kind = RefusedError if status in (400, 413, 422) else RequestError
    return kind(f"prompt {prompt}: answered {status}: {text[:500]}")


TOKEN_IDS = {"return_output_ids_in_sglext": True}
ROUNDS = {"return_spec_tokens_details": True}
"""Fields with which SGLang adds an answer's token ids, and the number of its verifications."""


def chat_body(prompt: Prompt, max_tokens: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of a chat completion request, greedy unless the prompt is sampled."""
    body = {"model": MODEL, "temperature": 0, "seed": prompt.seed, "max_tokens": max_tokens}
    return {**body, **prompt.request(), **fields}


@dataclass(frozen=True, slots=True)
class Asker:
    """A streaming chat client of one server. max_tokens: most tokens of an answer. request: fields of every request."""

    client: httpx.AsyncClient
    max_tokens: int
    request: Mapping[str, Any] = field(default_factory=dict)

    async def ask(self, prompt: Prompt) -> Answer:
        """Ask for one answer and time it.

        Raises:
            RequestError: the server answered with an error, or with something else than a streamed answer.
        """
        body = chat_body(prompt, self.max_tokens, {"stream": True, **self.request})
        arrived = await self.streamed(prompt.id, "/v1/chat/completions", body)
        # Parsed only now, so that parsing takes no time from the server that is measured on the same cores.
        try:
            return parse_stream(prompt.id, arrived)
        except RequestError:
            raise
        except NOT_AS_WRITTEN as error:
            raise RequestError(f"prompt {prompt.id}: this is no streamed chat completion: {error!r:.200}") from None

    async def streamed(self, prompt: str, path: str, body: Mapping[str, Any]) -> list[tuple[float, str]]:
        """Send a request and return the lines of its event stream as (seconds after the request, line).

        Raises:
            RequestError: the server answered with an error, or broke off.
        """
        began = time.perf_counter()
        try:
            async with self.client.stream("POST", path, json=body) as response:
                arrived = [(time.perf_counter() - began, line) async for line in stream_lines(response.aiter_bytes())]
        except (httpx.HTTPError, UnicodeEncodeError) as error:  # half a character in an answer to a turn before
            raise RequestError(f"prompt {prompt}: {type(error).__name__} {error}") from None
        if response.status_code != 200:
            raise error_of(prompt, response.status_code, "\n".join(line for _, line in arrived))
        return arrived

    async def run(self, load: Load, prompts: Sequence[Prompt]) -> list[Answer]:
        """Ask `prompts` under `load`; return answers in their order. Raises RequestError for the first that failed."""
        answers: dict[int, Answer] = {}
        queue = iter(enumerate(prompts))

        async def user() -> None:
            for index, prompt in queue:
                answers[index] = await self.ask(prompt)

        try:
            async with asyncio.TaskGroup() as users:
                for _ in range(min(load.value, len(prompts))):
                    users.create_task(user())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [answers[index] for index in range(len(prompts))]


def parse_stream(prompt: str, arrived: Sequence[tuple[float, str]]) -> Answer:
    """Parse an answer from the lines of an event stream. arrived: (seconds after the request, line).

    Raises:
        RequestError: the stream holds an error, is no event stream, or ends before the answer does.
    """
    first = last = reason = None
    parts: list[Mapping[str, Any]] = []
    extension: dict[str, Any] = {}
    for at, line in arrived:
        text = line.removeprefix("data:").strip()
        if not line.startswith("data:") or text == "[DONE]":
            continue
        event = read_json(text)
        if "error" in event:
            raise RequestError(f"prompt {prompt}: {event['error']!r:.500}")
        told = (event.get("sglext") or {}) | (event.get("usage") or {})
        extension |= {key: value for key, value in told.items() if value is not None}
        for choice in event.get("choices") or ():
            first, last = (at if first is None else first), at
            parts.append(choice.get("delta") or {})
            reason = choice.get("finish_reason") or reason
    written = "".join(map(text_of, parts))
    if first is None or last is None or reason is None:
        raise RequestError(f"prompt {prompt}: the answer ended early, after {len(written)} characters")
    said: dict[str, Any] = {"text": "".join(part.get("content") or "" for part in parts), "calls": _calls(parts)}
    verified = extension.get("spec_tokens_details", {}).get("spec_verify_ct")
    if "output_ids" not in extension:
        if not (count := extension.get("completion_tokens")):
            raise RequestError(f"prompt {prompt}: the server does not say how many tokens it wrote (`usage`)")
        tokens = tuple(map(ord, written))
        return Answer(prompt=prompt, seconds=last, ttft=first, tokens=tokens, forwards=verified, count=count, **said)
    tokens = tuple(extension["output_ids"][0])
    # Plain decoding reports no verifications: every token after the first is a forward.
    return Answer(prompt=prompt, seconds=last, ttft=first, tokens=tokens, forwards=verified or len(tokens) - 1, **said)


def _calls(parts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Return the tool calls whose parts a stream brought: the first part of each has its id, the others its number."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in (piece for part in parts for piece in part.get("tool_calls") or ()):
        call = calls.setdefault(piece.get("index", 0), {"id": piece.get("id"), "type": "function", "function": {}})
        for name, text in (piece.get("function") or {}).items():
            call["function"][name] = call["function"].get(name, "") + (text or "")
    return tuple(calls.values())


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of an answer or of a part of it: content, reasoning, names and arguments of calls."""
    called = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    said = [message.get("reasoning_content") or message.get("reasoning"), message.get("content")]
    return "".join(filter(None, [*said, *(one.get(name) for one in called for name in ("name", "arguments"))]))


def flush(client: httpx.Client) -> None:
    """Empty the prefix cache, so that no arm finds prefixes of another arm or of an earlier repetition."""
    # SGLang's scheduler waits up to `timeout` seconds until it has finished the last answer.
    if client.post("/flush_cache", params={"timeout": 10}).status_code == 200:
        return
    raise RequestError(
        f"{client.base_url} does not empty its prefix cache, because requests still run there: end its other clients"
    )


async def stream_lines(parts: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Yield the lines of a UTF-8 stream, each as soon as it is whole; the last one when the stream ends."""
    decode, begun, size = codecs.getincrementaldecoder("utf-8")("replace"), [""], 0
    async for chunk in parts:
        if (size := size + len(chunk)) > MOST_BYTES << 4:  # each event of SGLang's own route repeats the answer so far
            raise httpx.DecodingError("the answer is longer than 1 GiB")
        *ends, rest = decode.decode(chunk).split("\n")
        for end in ends:
            yield "".join((*begun, end)).removesuffix("\r")
            begun.clear()
        begun.append(rest)
    if line := "".join(begun):
        yield line.removesuffix("\r")
