"""The vocabulary masks that SGLang 0.5.23 applies, built with the same xgrammar calls and settings.

`response_format` compiles as a JSON schema with any whitespace (the server's default); `tool_choice:
required` under the `hermes` parser compiles as a structural tag whose argument schema is open unless the tool
is strict.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import xgrammar
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class GrammarSpec(NamedTuple):
    """What constrains an answer: `kind` says how `text` (a JSON string) is compiled."""

    kind: Literal["json", "structural_tag"]
    text: str


def response_format_grammar(response_format: dict[str, Any]) -> GrammarSpec | None:
    """The grammar of an OpenAI `response_format`; None for plain text."""
    kind = response_format["type"]
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarSpec("json", json.dumps({"type": "object"}))
    if kind == "json_schema":
        return GrammarSpec("json", json.dumps(response_format["json_schema"]["schema"]))
    raise ValueError(f"response_format type {kind!r} is not one of text, json_object, json_schema")


def tool_call_grammar(tools: Sequence[dict[str, Any]]) -> GrammarSpec:
    """At least one Hermes tool call, as `tool_choice: required` asks of SGLang's `hermes` parser."""
    structures = [
        {
            "begin": '<tool_call>{"name":"' + tool["function"]["name"] + '", "arguments":',
            "schema": (tool["function"].get("parameters") or {}) if tool["function"].get("strict") else {},
            "end": "}</tool_call>",
        }
        for tool in tools
    ]
    return GrammarSpec("structural_tag", json.dumps({"structures": structures, "triggers": ["<tool_call>"]}))


def server_parameter(spec: GrammarSpec) -> dict[str, str]:
    """The same as a sampling parameter of SGLang's."""
    if spec.kind == "json":
        return {"json_schema": spec.text}
    return {"structural_tag": json.dumps({**json.loads(spec.text), "at_least_one": True})}


class GrammarMasks:
    """Compiles grammars for one tokenizer and fills bit masks for rows of logits."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_id: int) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=[eos_id]
        )
        self._compiler = xgrammar.GrammarCompiler(info)
        self._vocab_size = vocab_size

    def matcher(self, spec: GrammarSpec) -> xgrammar.GrammarMatcher:
        """A fresh matcher. Raises `RuntimeError` (xgrammar's) for a schema that it cannot compile."""
        if spec.kind == "json":
            compiled = self._compiler.compile_json_schema(
                spec.text, any_whitespace=True, max_whitespace_cnt=None
            )
        else:
            parts = json.loads(spec.text)
            items = [
                xgrammar.StructuralTagItem(
                    begin=part["begin"], schema=json.dumps(part["schema"]), end=part["end"]
                )
                for part in parts["structures"]
            ]
            tag = xgrammar.StructuralTag.from_legacy_structural_tag(items, parts["triggers"])
            tag.format.at_least_one = True
            compiled = self._compiler.compile_structural_tag(tag)
        return xgrammar.GrammarMatcher(compiled)

    def apply(self, logits: Tensor, matchers: Sequence[xgrammar.GrammarMatcher | None]) -> None:
        """Mask `logits` [rows, V] in place: -inf where the row's grammar forbids the token."""
        constrained = [row for row, matcher in enumerate(matchers) if matcher and not matcher.is_terminated()]
        if not constrained:
            return
        bitmask = xgrammar.allocate_token_bitmask(len(constrained), self._vocab_size)
        for index, row in enumerate(constrained):
            matcher = matchers[row]
            assert matcher is not None
            matcher.fill_next_token_bitmask(bitmask, index)
        rows = torch.tensor(constrained, device=logits.device)
        masked = logits[rows].float()
        xgrammar.apply_token_bitmask_inplace(masked, bitmask.to(logits.device))
        logits[rows] = masked.to(logits.dtype)
