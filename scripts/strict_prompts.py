"""Writes `results/benchmark/structure.jsonl`: forced tool calls, and JSON whose schema is strict.

    python scripts/strict_prompts.py eval_prompts.jsonl

Held-out prompts that the shipped sample has not. Schemas are made strict as OpenAI's clients make them: every property
required, none beside them. `whiflash bench` asks prompts with tools under `tool_choice: required`.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "benchmark" / "structure.jsonl"
SHIPPED = ROOT / "whiflash_sglang" / "lab" / "bench" / "prompts.jsonl"
EACH = 12
MAX_CHARS = 1800
"""Of a prompt with its tools: some 500 tokens."""


def strict(schema: Any) -> Any:
    """`schema` with all properties of all objects required, and no others allowed."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        made |= {"additionalProperties": False, "required": list(schema["properties"])}
    return made


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    shipped = {json.dumps(row["messages"]) for row in rows_of(SHIPPED)}
    held_out = [row for row in rows_of(Path(sys.argv[1])) if json.dumps(row["messages"]) not in shipped]
    chosen = []
    for category in ("tool_call", "json"):
        fitting = [r for r in held_out if r["category"] == category and len(json.dumps(r)) <= MAX_CHARS]
        if category == "json":
            schemas = [row["response_format"]["json_schema"] for row in fitting]
            fitting = [
                r for r, s in zip(fitting, schemas, strict=True) if len(s["schema"].get("properties", {})) > 2
            ]
        chosen += random.Random(7).sample(fitting, EACH)
    for row in chosen:
        if "response_format" in row:
            kept = row["response_format"]["json_schema"]
            kept |= {"schema": strict(kept["schema"]), "strict": True}
        for tool in row.get("tools", ()):
            function = tool["function"]
            function |= {"parameters": strict(function["parameters"]), "strict": True}
    OUT.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), "utf-8")


if __name__ == "__main__":
    main()
