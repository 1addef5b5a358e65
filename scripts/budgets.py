"""Lines of Python by folder against `budgets.toml`: `python scripts/budgets.py`. Exits with 1 if one has too many."""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def over(root: Path = ROOT) -> Iterator[str]:
    """A message for each folder that has more lines than its budget, and for each package without one."""
    budgets = tomllib.loads((root / "budgets.toml").read_text("utf-8"))["lines"]
    for folder, most in budgets.items():
        files = list((root / folder).rglob("*.py"))
        lines = sum(len(file.read_text("utf-8").splitlines()) for file in files)
        if lines > most:
            yield f"{folder}: {lines:,} lines, budget {most:,}. Remove some, or raise it in a commit that says why."
        elif not files:
            yield f"{folder}: no Python, budget {most:,}. Remove the line in budgets.toml."
    packages = {
        file.parent.relative_to(root).as_posix() for file in root.glob("whiflash_sglang/*/__init__.py")
    }
    for folder in sorted(packages - budgets.keys()):
        yield f"{folder}: no budget. Add its lines to budgets.toml in a commit that says why."


if __name__ == "__main__":
    found = list(over())
    print("\n".join(found) or "every folder is within its lines")
    sys.exit(bool(found))
