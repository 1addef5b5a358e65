"""The whitespace bounds of `--constrained-json-*` for tool calls too.

Upstream applies them to `response_format` alone. The arguments of a forced tool call are a structural tag, whose
grammar lets whitespace repeat without end, and a small greedy model then writes nothing else until its token limit.
"""

import json
from typing import Any

from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

from whiflash_sglang.compat.carried import serves_ours
from whiflash_sglang.compat.patching import around, replace
from whiflash_sglang.jsonl import read_json

COMPACT = 1
"""Consecutive whitespace characters where the user asked for a compact form; the grammar's least."""


def install() -> None:
    """Idempotent."""
    replace(XGrammarGrammarBackend, "dispatch_structural_tag", _bounding)


@around
def _bounding(original: Any, self: Any, key_string: str) -> Any:
    if not serves_ours():
        return original(self, key_string)
    limit = self.max_whitespace_cnt or (None if self.any_whitespace else COMPACT)
    return original(self, key_string if limit is None else bounded_tag(key_string, limit))


def bounded_tag(text: str, limit: int) -> str:
    """A structural tag whose JSON has at most `limit` consecutive whitespace characters; others as they are.

    text: either of the two formats that SGLang takes. What is no tag comes back unchanged, for upstream to refuse.
    """
    try:
        tag = read_json(text)
    except ValueError:
        return text
    if not isinstance(tag, dict):
        return text
    if isinstance(tag.get("structures"), list) and "triggers" in tag:
        tag = {"type": "structural_tag", "format": _modern(tag)}
    _bound(tag.get("format"), limit)
    return json.dumps(tag)


def _modern(legacy: dict[str, Any]) -> dict[str, Any]:
    """The format of a legacy tag, which has no place for the bound."""
    tags = [
        {
            "type": "tag",
            "begin": structure["begin"],
            "content": {"type": "json_schema", "json_schema": structure.get("schema") or {}},
            "end": structure["end"],
        }
        for structure in legacy["structures"]
    ]
    return {
        "type": "triggered_tags",
        "triggers": legacy["triggers"],
        "tags": tags,
        "at_least_one": bool(legacy.get("at_least_one", False)),
    }


def _bound(part: Any, limit: int) -> None:
    """Set the bound on every JSON part that has none. Schemas are data: they are not searched."""
    if isinstance(part, list):
        for item in part:
            _bound(item, limit)
    elif isinstance(part, dict):
        if part.get("type") == "json_schema":
            part.setdefault("max_whitespace_cnt", limit)
        else:
            _bound(list(part.values()), limit)
