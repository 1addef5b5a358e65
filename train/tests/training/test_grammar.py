"""The grammars of prompts are the server's: same structural tag, same allowed tokens."""

import json

import pytest
import torch
import xgrammar
from tiny_models import tiny_target
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_train.answers.prompts import (
    GrammarSpec,
    response_format_grammar,
    server_parameter,
    tool_call_grammar,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "strict": True, "parameters": {"type": "object"}}},
]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
VOCABULARY = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_target(tmp_path_factory.mktemp("target")))


def allowed(matcher: xgrammar.GrammarMatcher) -> torch.Tensor:
    mask = xgrammar.allocate_token_bitmask(1, VOCABULARY)
    matcher.fill_next_token_bitmask(mask, 0)
    logits = torch.zeros(1, VOCABULARY)
    xgrammar.apply_token_bitmask_inplace(logits, mask)
    return logits[0] == 0


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name":"get_weather", "arguments":{"any": [1]}}</tool_call> and more',
        '<tool_call>{"name":"stop", "arguments":{}}</tool_call>',
    ],
)
def test_tool_calls_are_constrained_as_the_servers_parser_asks(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    backend = XGrammarGrammarBackend(
        tokenizer, vocab_size=VOCABULARY, model_eos_token_ids=[tokenizer.eos_token_id]
    )
    parser = FunctionCallParser([Tool(**tool) for tool in TOOLS], "hermes")
    kind, tag = parser.get_structure_constraint("required")
    asked = server_parameter(tool_call_grammar(TOOLS))
    assert [kind] == list(asked) == ["structural_tag"]
    ours, theirs = (
        backend.dispatch_structural_tag(text).matcher
        for text in (asked[kind], json.dumps(tag.model_dump(by_alias=True)))
    )
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert torch.equal(allowed(ours), allowed(theirs))
        assert ours.accept_token(token)
        assert theirs.accept_token(token)
    assert torch.equal(allowed(ours), allowed(theirs))


def test_response_formats() -> None:
    assert response_format_grammar({"type": "text"}) is None
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert response_format_grammar(named) == GrammarSpec("json", json.dumps(SCHEMA))
    with pytest.raises(ValueError, match="'xml' is not one of"):
        response_format_grammar({"type": "xml"})


def test_arguments_of_a_tool_without_strict_are_open() -> None:
    structures = json.loads(tool_call_grammar(TOOLS).text)["structures"]
    assert [part["schema"] for part in structures] == [{}, {"type": "object"}]
