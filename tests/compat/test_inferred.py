"""Spans that a request implies come from the parsers in effect: `auto` has become a name by then."""

from types import SimpleNamespace

from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

from whiflash_sglang.compat.http.requests import _inferred


def test_auto_is_what_sglang_found() -> None:
    found = {"tool_call_parser": "qwen3_coder", "reasoning_parser": "qwen3"}
    manager = SimpleNamespace(
        config_value=found.get, server_args=SimpleNamespace(tool_call_parser="auto", reasoning_parser="auto")
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    message = {"role": "user", "content": "?"}
    request = ChatCompletionRequest(model="m", messages=[message], tools=[tool])
    assert {span.begin for span in _inferred(manager, request)} >= {"<think>", "<tool_call>"}
