"""What converted requests say and imply is read as of the chat requests that they would be."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.openai.protocol import ResponsesRequest
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses

from whiflash_sglang.compat.http.converted import _as_chat, _carrying_on, _reading_messages
from whiflash_sglang.compat.http.requests import completed
from whiflash_sglang.spans.hints import TOOLS_KEY, parse_hints

TOOL = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
OTHER = {**TOOL, "name": "g"}
MESSAGE: dict[str, Any] = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}


def implied(**asked: Any) -> tuple[list[tuple[str, bool]], str | None]:
    """Spans by kind, and whether they are open; and what is told of the tools."""
    serving = SimpleNamespace(tool_call_parser="hermes")
    for name in ("_response_tools_to_chat_tools", "_chat_tool_choice"):
        method = getattr(OpenAIServingResponses, name)
        setattr(serving, name, lambda request, method=method: method(serving, request))
    settings = SimpleNamespace(structure=SimpleNamespace(enabled=True), force_recorded=False)
    manager = SimpleNamespace(
        config_value=lambda name: "hermes" if name == "tool_call_parser" else None,
        server_args=SimpleNamespace(_whiflash=settings),
        model_config=SimpleNamespace(vocab_size=8),
    )
    request = ResponsesRequest(model="m", input="x", **asked)
    params = completed(manager, _as_chat(serving, request), None)
    return [(span.kind, span.open) for span in parse_hints(params).spans], params.get(TOOLS_KEY)


def test_tools_and_formats_imply_spans_and_calls() -> None:
    fences = [("json", False), ("code", False)]
    assert implied() == (fences, None)
    spans, tools = implied(tools=[TOOL, OTHER])
    assert spans == [("tool_call", False), *fences]
    assert tools is not None
    assert '"f"' in tools
    assert '"g"' in tools
    assert implied(tools=[TOOL], tool_choice="none") == (fences, None)
    assert implied(tools=[TOOL], tool_choice="required")[0] == [("tool_call", True)]
    schema = {"type": "json_schema", "name": "s", "schema": {"type": "object"}}
    assert implied(text={"format": schema})[0] == [("json", True)]


@pytest.mark.parametrize("named", ["f", "g"])
def test_a_named_tool_is_the_only_one_that_is_told(named: str) -> None:
    spans, tools = implied(tools=[TOOL, OTHER], tool_choice={"type": "function", "name": named})
    assert spans == [("tool_call", True)]
    assert tools is not None
    assert [name for name in ("f", "g") if f'"{name}"' in tools] == [named]


def converted(body: dict[str, Any]) -> Any:
    """The chat request that a message becomes, or the error that it is refused with."""
    plain = SimpleNamespace(cache_salt=None, extra_key=None, custom_params=None)
    serving = SimpleNamespace(
        openai_serving_chat=SimpleNamespace(
            tokenizer_manager=SimpleNamespace(server_args=SimpleNamespace(_whiflash=object()))
        ),
        _error_response=lambda status, kind, message: (status, message),
    )

    async def handle(_serving: Any, request: Any, _raw: Any) -> Any:
        return _carrying_on(lambda *_: plain, serving, request)

    async def sent() -> dict[str, Any]:
        return body

    request = AnthropicMessagesRequest.model_validate(body)
    return asyncio.run(_reading_messages(handle, serving, request, SimpleNamespace(json=sent)))


def test_a_message_carries_hints_and_salts() -> None:
    said = {"custom_params": {"whiflash": "{}"}, "cache_salt": "acme", "extra_key": "k"}
    request = converted({**MESSAGE, **said})
    assert {name: getattr(request, name) for name in said} == said
    assert converted(MESSAGE).cache_salt is None


def test_a_salt_that_is_no_text_is_refused() -> None:
    assert converted({**MESSAGE, "cache_salt": ["a"]}) == (400, "cache_salt: must be text")
