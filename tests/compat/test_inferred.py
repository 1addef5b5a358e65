"""Spans that a request implies: by the parsers in effect, and where an answer that it begins stops."""

from types import SimpleNamespace

import pytest
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

from whiflash_sglang.http.reader import _inferred


def test_auto_is_what_sglang_found() -> None:
    found = {"tool_call_parser": "qwen3_coder", "reasoning_parser": "qwen3"}
    manager = SimpleNamespace(
        config_value=found.get, server_args=SimpleNamespace(tool_call_parser="auto", reasoning_parser="auto")
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    message = {"role": "user", "content": "?"}
    request = ChatCompletionRequest(model="m", messages=[message], tools=[tool])
    assert {span.begin for span in _inferred(manager, request)} >= {"<think>", "<tool_call>"}


@pytest.mark.parametrize(("goes_on", "opened"), [(True, ["code"]), (False, [])])
def test_an_answer_that_the_request_begins_is_followed(goes_on: bool, opened: list[str]) -> None:
    """Without the flag SGLang makes a last assistant message the user's."""
    manager = SimpleNamespace(config_value={}.get)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "```python\nprint("}]
    request = ChatCompletionRequest(model="m", messages=messages, continue_final_message=goes_on)
    assert [span.kind for span in _inferred(manager, request) if span.open] == opened
