"""Prompt rows as the server would see them: rendered with the bundle's template, grammar attached."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from whiflash_sglang.train.grammar import GrammarSpec, response_format_grammar, tool_call_grammar


class PromptRow(NamedTuple):
    """One request: token ids of the rendered conversation and the grammar that constrains its answer."""

    id: str
    category: str
    tokens: list[int]
    grammar: GrammarSpec | None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL prompt file. Raises `ValueError` naming the line where one is not usable."""
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or not row.get("messages"):
                raise ValueError(f"{path}, line {number}: a row needs a non-empty 'messages' list")
            row.setdefault("id", hashlib.sha256(line.encode()).hexdigest()[:12])
            row.setdefault("category", "chat")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def balanced(
    rows: Iterable[dict[str, Any]], weights: Mapping[str, float], seed: int
) -> Iterator[dict[str, Any]]:
    """The rows shuffled so that every prefix mixes the categories in proportion to `weights` (default 1)."""
    generator = random.Random(seed)
    queues: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        queues[row["category"]].append(row)
    for queue in queues.values():
        generator.shuffle(queue)
    credit = dict.fromkeys(sorted(queues), 0.0)
    while queues:
        for category in queues:
            credit[category] += weights.get(category, 1.0)
        chosen = max(queues, key=lambda category: credit[category])
        if credit[chosen] <= 0:
            return
        credit[chosen] -= sum(weights.get(category, 1.0) for category in queues)
        yield queues[chosen].pop()
        if not queues[chosen]:
            del queues[chosen]


def prepare(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, required_share: float
) -> PromptRow:
    """Render one row. `required_share` of the rows with tools (chosen by their id) use `tool_choice:
    required`.
    """
    tools = row.get("tools") or None
    encoded = tokenizer.apply_chat_template(
        row["messages"], tools=tools, chat_template=template, add_generation_prompt=True, return_dict=True
    )
    grammar = None
    if row.get("response_format"):
        grammar = response_format_grammar(row["response_format"])
    elif tools and int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 1000 < required_share * 1000:
        grammar = tool_call_grammar(tools)
    return PromptRow(row["id"], row["category"], list(encoded["input_ids"]), grammar)
