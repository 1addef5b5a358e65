"""Requests that SGLang converts before it serves them: OpenAI's Responses and Anthropic's Messages.

Neither has a field for hints, so they are read from the body, as on chat completions: `custom_params`, `prediction` and
AgentSpec's fields; of Messages `cache_salt` and `extra_key` too, which SGLang reads on the other routes. Servers that
did not ask for this algorithm, and requests that say nothing, are SGLang's own. In the process that serves HTTP.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from whiflash_sglang.compat.carried import asks_for_ours
from whiflash_sglang.compat.http.requests import completed, from_body
from whiflash_sglang.compat.patching import around
from whiflash_sglang.spans.hints import HintError

_SAID: ContextVar[dict[str, Any] | None] = ContextVar("whiflash_said", default=None)
"""Fields of chat completions that the request has which is being converted; no entry for those that say nothing."""
_KEYS = ("cache_salt", "extra_key")


def routes(state: Any) -> tuple[str, ...]:
    """Below `/v1`: whose requests may say anything. state: of SGLang's app, which may serve no Responses."""
    responses = ("responses",) if hasattr(state, "openai_serving_responses") else ()
    return "chat/completions", "completions", "messages", *responses


@contextmanager
def _saying(fields: dict[str, Any]) -> Iterator[None]:
    token = _SAID.set(fields)
    try:
        yield
    finally:
        _SAID.reset(token)


def _said(body: object) -> dict[str, Any] | None:
    """What a body says to WHIFLASH. Raises HintError."""
    params = body.get("custom_params") if isinstance(body, Mapping) else None
    if params is not None and not isinstance(params, dict):
        raise HintError("custom_params", "must be an object")
    return from_body(params, body)


def _keys(body: object) -> dict[str, str]:
    """Whose text it is. Raises HintError."""
    given = {name: body.get(name) for name in _KEYS} if isinstance(body, Mapping) else {}
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise HintError(name, "must be text")
    return {name: value for name, value in given.items() if value is not None}


def _fields(params: dict[str, Any] | None) -> dict[str, Any]:
    return {} if params is None else {"custom_params": params}


@around(
    "sglang.srt.entrypoints.anthropic.serving:AnthropicServing.handle_messages",
    params=("request", "raw_request"),
    why="Messages drops fields that it does not know",
    until="SGLang keeps them",
)
async def _reading_messages(original: Any, self: Any, request: Any, raw_request: Any) -> Any:
    """Hints are read from the body of Messages."""
    if not asks_for_ours(self.openai_serving_chat.tokenizer_manager.server_args):
        return await original(self, request, raw_request)
    body = await raw_request.json()
    try:
        said = {**_fields(_said(body)), **_keys(body)}
    except HintError as error:
        return self._error_response(400, "invalid_request_error", str(error))
    with _saying(said):
        return await original(self, request, raw_request)


@around(
    "sglang.srt.entrypoints.anthropic.serving:AnthropicServing._convert_to_chat_completion_request",
    params=("anthropic_request",),
    why="Messages has no `custom_params`",
    until="SGLang carries them over",
)
def _carrying_on(original: Any, self: Any, anthropic_request: Any) -> Any:
    """What was said goes with the chat request that a message becomes, which is validated as every chat request is."""
    chat_request = original(self, anthropic_request)
    for name, value in (_SAID.get() or {}).items():
        setattr(chat_request, name, value)
    return chat_request


@around(
    "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses.create_responses",
    params=("request", "raw_request"),
    why="Responses drops fields that it does not know",
    until="SGLang keeps them",
    optional=True,
)
async def _reading_responses(original: Any, self: Any, request: Any, raw_request: Any = None) -> Any:
    """Hints are read from the body of Responses."""
    manager = self.tokenizer_manager
    if raw_request is None or not manager or not asks_for_ours(manager.server_args):
        return await original(self, request, raw_request)
    try:
        said = completed(manager, _as_chat(self, request), _said(await raw_request.json()))
    except HintError as error:
        return self.create_error_response(str(error), param=error.field)
    with _saying(_fields(said)):
        return await original(self, request, raw_request)


def _as_chat(serving: Any, request: Any) -> SimpleNamespace:
    """What of a Responses request implies spans and calls, as a chat request has it."""
    choice = request.effective_tool_choice()
    if isinstance(choice, dict):
        choice = SimpleNamespace(function=SimpleNamespace(name=choice["name"]))
    try:
        tools = serving._response_tools_to_chat_tools(request)
    except ValueError:  # SGLang refuses them by itself
        tools = []
    return SimpleNamespace(
        tools=tools,
        tool_choice=choice if tools else "none",
        response_format=getattr(request.text, "format", None),
    )


@around(
    "sglang.srt.entrypoints.openai.protocol:ResponsesRequest.to_sampling_params",
    why="Responses has no `custom_params`",
    until="SGLang carries them over",
)
def _sampling(original: Any, self: Any, *args: Any, **named: Any) -> Any:
    """Hints go with the sampling parameters of Responses."""
    params = original(self, *args, **named)
    return {**params, **(_SAID.get() or {})}
