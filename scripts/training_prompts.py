"""Training prompts for what our prompt files have none of: summaries, and agents after a tool's answer.

Summaries ask for passages of the descriptions of installed packages (of a permissive licence that their metadata names)
and of the target's own answers to chat prompts. Agents' prompts go on from the target's own tool calls: its call, a
result that a tool might give, and the user waiting. Both are JSON lines as `whiflash train data` reads them.

    python scripts/training_prompts.py train_prompts.jsonl training_data/smollm2-135m-instruct/tokens.npz more.jsonl
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from whiflash_sglang.embedded import ensure_target
from whiflash_sglang.train.answers.prompts import read_rows
from whiflash_sglang.train.answers.tokens import Exported

PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|0BSD)\b", re.IGNORECASE)
COPYLEFT = re.compile(r"GPL|MPL|proprietary|nvidia", re.IGNORECASE)
SUMMARISE = (
    "Summarize: {}",
    "Summarise the following text in two or three sentences.\n\n{}",
    "{}\n\nSummarize the text above briefly.",
    "What are the main points of this text?\n\n{}",
    "Give a short summary of this passage:\n\n{}",
    "Please write one paragraph that says what this text is about.\n\n{}",
)
RESULTS = ("succeeded", "ok", "completed", "found", "created")


def passages(text: str, least: int = 60, most: int = 260) -> Iterator[str]:
    """Stretches of whole prose paragraphs of `least` to `most` words."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        prose = (
            len(line) > 80
            and line[0].isalpha()
            and sum(c.isalpha() or c == " " for c in line) > 0.88 * len(line)
        )
        if prose and "](" not in line and "::" not in line and "`" not in line:
            kept.append(line)
        words = sum(len(part.split()) for part in kept)
        if kept and (words >= most // 2 or not prose):
            if least <= words <= most:
                yield "\n".join(kept)
            kept = []


def licence_of(package: Distribution) -> str | None:
    """The permissive licence that a package's metadata names, and no other."""
    meta = package.metadata
    named = [meta.get("License-Expression") or "", (meta.get("License") or "")[:80]]
    named += [c for c in meta.get_all("Classifier") or [] if c.startswith("License")]
    text = " ".join(named)
    return None if COPYLEFT.search(text) or not (found := PERMISSIVE.search(text)) else found.group(1)


def described() -> Iterator[tuple[str, str, str]]:
    """(passage, source, licence) of the descriptions of installed packages."""
    for package in sorted(distributions(), key=lambda p: p.metadata["Name"].lower()):
        licence = licence_of(package)
        text = package.metadata.get("Description") or package.metadata.get_payload()
        if licence and isinstance(text, str):
            for passage in passages(text):
                yield passage, f"description of {package.metadata['Name']}", licence


def answers_of(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[str, bool]]:
    """Stored answers of the target by the prompt's id: text, and whether it ended in a loop."""
    stored = Exported(path)
    answers = {}
    for index, name in enumerate(stored.ids):
        answer = stored.tokens(index)[stored.columns["prompt_lengths"][index] :]
        text = tokenizer.decode(answer.tolist(), skip_special_tokens=True)
        answers[name] = text, bool(stored.columns["looped"][index])
    return answers


def summaries(rows: list[dict[str, Any]], answers: dict[str, tuple[str, bool]]) -> Iterator[dict[str, Any]]:
    """A prompt for every passage, each asked for in one of six ways."""
    told = (
        (" ".join(text.split()), f"the target's answer to {row['source']}", "Apache-2.0")
        for row in rows
        if row["category"] == "chat" and row["id"] in answers
        for text, looped in [answers[row["id"]]]
        if not looped and len(text.split()) >= 90
    )
    for passage, source, licence in (*described(), *told):
        chosen = int(hashlib.sha256(passage.encode()).hexdigest(), 16)
        request = SUMMARISE[chosen % len(SUMMARISE)].format(passage)
        yield _row("summarisation", [{"role": "user", "content": request}], source, licence)


def continued(rows: list[dict[str, Any]], answers: dict[str, tuple[str, bool]]) -> Iterator[dict[str, Any]]:
    """The conversation after the target's own tool calls and results that repeat what was asked with a status."""
    for row in rows:
        if row["category"] != "tool_call" or row["id"] not in answers:
            continue
        calls = [
            json.loads(text)
            for text in re.findall(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", answers[row["id"]][0], re.S)
            if _is_json(text)
        ]
        calls = [call for call in calls if isinstance(call.get("arguments"), dict) and call.get("name")]
        if not calls:
            continue
        draw = random.Random(row["id"])
        messages = [
            *row["messages"],
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [_call(n, call) for n, call in enumerate(calls)],
            },
        ]
        for n, call in enumerate(calls):
            result = {"status": draw.choice(RESULTS), "id": draw.randrange(10**5), **call["arguments"]}
            messages.append({"role": "tool", "tool_call_id": f"call_{n}", "content": json.dumps(result)})
        yield _row(
            "agent",
            messages,
            f"{row['source']}, continued after the target's call",
            row["license"],
            row.get("tools"),
        )


def _call(number: int, call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
    return {"id": f"call_{number}", "type": "function", "function": function}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _row(
    category: str,
    messages: list[dict[str, Any]],
    source: str,
    licence: str,
    tools: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    name = hashlib.sha256(json.dumps([messages, tools], sort_keys=True).encode()).hexdigest()[:12]
    row = {"category": category, "messages": messages, "source": source, "license": licence, "id": name}
    return {**row, "tools": tools} if tools else row


def main() -> None:
    """Write the prompts and say how many there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", type=Path, help="training prompts (JSON lines) that have been answered")
    parser.add_argument(
        "answers", type=Path, help="token ids of the answers, as `whiflash train export` writes them"
    )
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rows = read_rows(args.prompts)
    answers = answers_of(args.answers, AutoTokenizer.from_pretrained(ensure_target()))
    made = {row["id"]: row for row in (*summaries(rows, answers), *continued(rows, answers))}
    args.out.write_text("".join(json.dumps(row) + "\n" for row in made.values()))
    for category in ("summarisation", "agent"):
        print(f"{category}: {sum(row['category'] == category for row in made.values()):,}")


if __name__ == "__main__":
    main()
