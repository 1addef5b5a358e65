"""Writes edits of files of this repository, each with the file as prediction, to `results/benchmark/`.

    python scripts/edits.py

In `edits.jsonl` the prompt holds the file as well; in `edits-unseen.jsonl` the prompt only names it, as where an
agent has an older copy that its conversation no longer holds. The recorded answer is the file with a tenth of its lines
changed, seeded: half of them have a word changed, others are followed by a new line, replaced, or left out.
`whiflash bench --recorded` plays both.
"""

import json
import random
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "benchmark"
CHARS = 3000
"""Of a file, its last line cut there left out."""

SHARE = 0.1
FILES = {
    "code": (
        "whiflash_sglang/lookup/index.py",
        "whiflash_sglang/routing/assign.py",
        "whiflash_sglang/cache/backlog.py",
        "whiflash_sglang/jsonl.py",
        "whiflash_sglang/lab/bench/runner.py",
        "sdk/whiflash_sdk/spans.py",
    ),
    "document": (
        "docs/how-to/benchmark.md",
        "docs/reference/traces.md",
        "docs/how-to/gateway.md",
        "docs/explanation/round.md",
        "docs/how-to/training.md",
        "SECURITY.md",
    ),
}


def edited(text: str, rng: random.Random) -> str:
    """`text` with a tenth of its lines changed."""
    lines = []
    for line in text.split("\n"):
        if not line.strip() or rng.random() >= SHARE:
            lines.append(line)
            continue
        kind = rng.random()
        if kind < 0.5:
            words = line.split(" ")
            longest = max(range(len(words)), key=lambda i: len(words[i]))
            words[longest] = f"{words[longest][:3]}_changed"
            lines.append(" ".join(words))
        elif kind < 0.75:
            indent = line[: len(line) - len(line.lstrip())]
            lines += [line, f"{indent}note({rng.randrange(100)})  # added behind it"]
        elif kind < 0.9:
            lines.append("this line was written anew, and nothing of it was expected")  # words: data
    return "\n".join(lines)


def record(name: str, category: str, asked: str, text: str, answer: str) -> dict[str, Any]:
    """A conversation of one turn, as `whiflash bench --recorded` reads it."""
    return {
        "id": name,
        "category": category,
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        "prediction": {"type": "content", "content": text},
    }


def main() -> None:
    rng = random.Random(1)
    seen, unseen = [], []
    for category, names in FILES.items():
        for name in names:
            text = (ROOT / name).read_text("utf-8")[:CHARS].rpartition("\n")[0]
            answer = edited(text, rng)
            asked = "Apply the changes that we spoke of, and answer with the whole file."
            seen.append(record(name, category, f"{asked}\n\n{text}", text, answer))
            unseen.append(record(name, category, f"{asked} It is {name}.", text, answer))
    for file, rows in (("edits.jsonl", seen), ("edits-unseen.jsonl", unseen)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (OUT / file).write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
