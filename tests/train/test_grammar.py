"""The masks of data generation are the server's: same structural tag, same allowed tokens."""

import json

import pytest
import torch
import xgrammar
from tiny_models import tiny_target
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_sglang.train.answers.generate import GrammarMasks
from whiflash_sglang.train.answers.prompts import GrammarSpec, response_format_grammar, tool_call_grammar

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
    ("spec", "text"),
    [
        (
            tool_call_grammar(TOOLS),
            '<tool_call>{"name":"get_weather", "arguments":{"any": [1]}}</tool_call> and more',
        ),
        (tool_call_grammar(TOOLS), '<tool_call>{"name":"stop", "arguments":{}}</tool_call>'),
        (GrammarSpec("json", json.dumps(SCHEMA)), '{\n  "n": 42 }'),
    ],
)
def test_masks_equal_those_of_the_servers_backend(
    tokenizer: PreTrainedTokenizerBase, spec: GrammarSpec, text: str
) -> None:
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    backend = XGrammarGrammarBackend(
        tokenizer, vocab_size=VOCABULARY, model_eos_token_ids=[tokenizer.eos_token_id]
    )
    if spec.kind == "json":
        theirs = backend.dispatch_json(spec.text)
    else:
        parser = FunctionCallParser([Tool(**tool) for tool in TOOLS], "hermes")
        kind, tag = parser.get_structure_constraint("required")
        assert kind == "structural_tag"
        theirs = backend.dispatch_structural_tag(json.dumps(tag.model_dump(by_alias=True)))
    ours = GrammarMasks(tokenizer, VOCABULARY, tokenizer.eos_token_id).matcher(spec)
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert torch.equal(allowed(ours), allowed(theirs.matcher))
        assert ours.accept_token(token)
        assert theirs.matcher.accept_token(token)
    assert torch.equal(allowed(ours), allowed(theirs.matcher))


def test_apply_masks_only_constrained_rows(tokenizer: PreTrainedTokenizerBase) -> None:
    masks = GrammarMasks(tokenizer, VOCABULARY, tokenizer.eos_token_id)
    logits = torch.zeros(3, VOCABULARY, dtype=torch.bfloat16)
    masks.apply(logits, [None, masks.matcher(GrammarSpec("json", json.dumps(SCHEMA))), None])
    assert (logits[[0, 2]] == 0).all()
    assert torch.isneginf(logits[1]).sum() > VOCABULARY // 2


def test_response_formats() -> None:
    assert response_format_grammar({"type": "text"}) is None
    named = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert response_format_grammar(named) == GrammarSpec("json", json.dumps(SCHEMA))
    with pytest.raises(ValueError, match="'xml' is not one of"):
        response_format_grammar({"type": "xml"})


def test_arguments_of_a_tool_without_strict_are_open() -> None:
    structures = json.loads(tool_call_grammar(TOOLS).text)["structures"]
    assert [part["schema"] for part in structures] == [{}, {"type": "object"}]
