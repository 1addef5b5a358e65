"""Fenced blocks of the documentation: which of them run, where, and what they are to print.

A Python block runs as it stands, after the blocks before it on its page. One that needs a server stands behind
`<!-- block: server -->`. A `text` block right behind a Python block is what that prints.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- block: (?P<mark>\w+) -->\n *)?```(?P<language>\w*)\n(?P<body>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """mark: what it needs, or ''. prints: the text behind it, where it is to print just that."""

    language: str
    body: str
    mark: str
    prints: str | None


def pages() -> list[Path]:
    """Pages of the documentation, without reports: those are as their commands wrote them."""
    parts = ("examples/agents", "cpu", "kernels", "lab", "sdk", "tests", "train")
    single = ("README.md", "CONTRIBUTING.md", *(f"{part}/README.md" for part in parts))
    return [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in single)]


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in its order, indentation of lists taken away."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    listed = []
    for place, match in enumerate(found):
        after = found[place + 1] if place + 1 < len(found) else None
        follows = after is not None and not text[match.end() : after.start()].strip()
        output = _body(after) if after is not None and follows and after["language"] == "text" else None
        listed.append(Block(match["language"], _body(match), match["mark"] or "", output))
    return listed


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def _body(match: re.Match[str]) -> str:
    return re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
