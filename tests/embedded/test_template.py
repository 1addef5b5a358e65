"""The bundle's chat template: the model's own without tools, the Hermes format with them."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from whiflash_sglang.checkpoints.manifest import embedded_bundle

OWN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template inside the GGUF (tokenizer.chat_template)."""

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
USER = {"role": "user", "content": "1 + 2?"}


def render(
    messages: list[dict], tools: list[dict] | None = None, template: str | None = None, start: bool = True
) -> str:
    template = template or (embedded_bundle() / "chat_template.jinja").read_text()
    rendered, _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=start
    )
    return rendered[0]


def call(arguments: object) -> dict:
    return {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}


def rendered_call(arguments: object) -> str:
    return render([USER, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}], [TOOL], start=False)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "Be brief."}, USER],
        [USER, {"role": "assistant", "content": "3"}, {"role": "user", "content": " and <b>\n\n 2?"}],
    ],
)
def test_without_tools_it_is_the_models_own(messages: list[dict], start: bool) -> None:
    assert render(messages, start=start) == render(messages, template=OWN, start=start)


def test_tools_are_listed_in_the_system_turn() -> None:
    system, rest = render([{"role": "system", "content": "Be brief."}, USER], [TOOL]).split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\nBe brief.")
    assert json.loads(system.split("<tools>\n")[1].split("\n</tools>")[0]) == TOOL
    assert rest == "<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_calls_are_rendered_alike_from_text_and_from_a_dictionary(arguments: object) -> None:
    text = rendered_call(arguments)
    expected = '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
    assert text.endswith(expected)


def test_text_before_calls_and_several_calls() -> None:
    turn = {"role": "assistant", "content": "Adding.", "tool_calls": [call({"a": 1}), call({"a": 2})]}
    text = render([USER, turn], [TOOL], start=False)
    assert text.count("<tool_call>\n{") == 3  # the instructions in the system turn show one
    assert "Adding.\n<tool_call>\n" in text
    assert "</tool_call>\n<tool_call>" in text


def test_results_of_one_turn_share_a_user_turn() -> None:
    results = [{"role": "tool", "tool_call_id": f"c{i}", "content": str(i)} for i in range(2)]
    turn = {"role": "assistant", "content": "", "tool_calls": [call({"a": 1}), call({"a": 2})]}
    assert render([USER, turn, *results], [TOOL]).endswith(
        "<|im_start|>user\n<tool_response>\n0\n</tool_response>\n<tool_response>\n1\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_sglangs_hermes_parser_reads_what_the_template_writes() -> None:
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    answer = rendered_call({"a": 7}).split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    _, calls = FunctionCallParser([Tool(**TOOL)], "hermes").parse_non_stream(answer)
    assert [(found.name, json.loads(found.parameters)) for found in calls] == [("add", {"a": 7})]
