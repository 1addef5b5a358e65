"""Prompts for the embedded target as token ids and sampling parameters, as the server would make them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from whiflash_sglang.checkpoints.manifest import embedded_bundle

PROMPTS = Path(__file__).parent.parent / "data" / "prompts.jsonl"


@dataclass(frozen=True)
class Prompt:
    """kind: chat, math, code, json (under a schema) or tool_call (`tool_choice` required)."""

    name: str
    kind: str
    tokens: tuple[int, ...]
    params: dict[str, Any]


@cache
def prompts(target: Path, own_template: bool = False) -> tuple[Prompt, ...]:
    """All rows of `prompts.jsonl`, in the embedded bundle's chat template, or in the target's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    template = None if own_template else (embedded_bundle() / "chat_template.jinja").read_text()
    found = []
    for row in map(json.loads, PROMPTS.read_text(encoding="utf-8").strip().split("\n")):
        text = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), chat_template=template, add_generation_prompt=True, tokenize=False
        )
        tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        found.append(Prompt(f"{row['category']}-{row['id']}", row["category"], tokens, constraint(row)))
    return tuple(found)


def constraint(row: dict[str, Any]) -> dict[str, Any]:
    """The grammar that the OpenAI route would attach to the request."""
    if "response_format" in row:
        return {"json_schema": json.dumps(row["response_format"]["json_schema"]["schema"])}
    if "tools" not in row:
        return {}
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    parser = FunctionCallParser([Tool(**tool) for tool in row["tools"]], "hermes")
    kind, value = parser.get_structure_constraint("required")
    return {kind: value if isinstance(value, str) else json.dumps(_plain(value))}


def _plain(value: Any) -> Any:
    return value.model_dump(by_alias=True) if hasattr(value, "model_dump") else value
