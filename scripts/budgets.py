"""Lines of Python and a server's record types against `budgets.toml`. Exits with 1 if there are too many.

On a branch or for a pull request it warns, and review decides. A commit that raises a bound is refused, too, unless
lines `Removes: PATH (lines)` of its message come to as much.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "whiflash_sglang": "whiflash_sglang",
    "whiflash_kernels": "kernels/whiflash_kernels",
    "whiflash_sdk": "sdk/whiflash_sdk",
}
STARTS = ("whiflash_sglang.serve.plugin", "whiflash_sglang.serve.worker")
"""Modules that SGLang loads; a server knows what they import."""
BESIDE = ("deploy", "docs", "examples", "scripts", "training_data")
"""Folders that are neither product nor tests."""
REMOVES = re.compile(r"^Removes: \S+ \((\d+)\)$", re.MULTILINE)
RECORD_BASES = {"NamedTuple", "TypedDict", "BaseModel"}


def over(root: Path = ROOT) -> Iterator[str]:
    """Yield a message for each budget or bound in `budgets.toml` that is exceeded, and for each package without one."""
    budgets = tomllib.loads((root / "budgets.toml").read_text("utf-8"))
    yield from _lines(root, budgets["lines"])
    yield from _totals(root, budgets.get("total", {}))
    yield from _raised(root)
    most = budgets.get("records", {}).get("server")
    if most is not None and (known := len(records())) > most:
        yield f"server: {known} record types, budget {most}. Remove some, or raise it in a commit that says why."


def _lines(root: Path, budgets: dict[str, Any]) -> Iterator[str]:
    for folder, most in budgets.items():
        files = list((root / folder).rglob("*.py"))
        lines = sum(len(file.read_text("utf-8").splitlines()) for file in files)
        if lines > most:
            yield f"{folder}: {lines:,} lines, budget {most:,}. Remove some, or raise it in a commit that says why."
        elif not files:
            yield f"{folder}: no Python, budget {most:,}. Remove the line in budgets.toml."
    packages = {file.parent.relative_to(root).as_posix() for file in root.glob("whiflash_sglang/*/__init__.py")}
    for folder in sorted(packages - budgets.keys()):
        yield f"{folder}: no budget. Add its lines to budgets.toml in a commit that says why."


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout


def _totals(root: Path, budgets: dict[str, int]) -> Iterator[str]:
    """Yield a message for each total of tracked Python lines, product or tests, that is above its bound."""
    lines = Counter[str]()
    for path in map(Path, filter(None, _git(root, "ls-files", "-z", "*.py").split("\0"))):
        if (root / path).is_file() and path.parts[0] not in BESIDE:
            kind = "tests" if "tests" in path.parts else "product"
            lines[kind] += len((root / path).read_text("utf-8").splitlines())
    for kind, most in budgets.items():
        if lines[kind] > most:
            yield f"{kind}: {lines[kind]:,} lines, budget {most:,}. Remove as many as you add: this bound only falls."


def _raised(root: Path) -> Iterator[str]:
    """Yield a message for each commit, since totals exist, that raises bounds by more lines than it removes."""

    def bounds(revision: str) -> dict[str, int]:
        found = tomllib.loads(_git(root, "show", f"{revision}:budgets.toml"))
        return {f"{table} {name}": most for table in ("total", "lines") for name, most in found.get(table, {}).items()}

    for commit in _git(root, "log", "--format=%h", "--", "budgets.toml").split():
        before, after = bounds(f"{commit}^"), bounds(commit)
        if not any(name.startswith("total") for name in before):
            return
        # A new folder brings its lines along: the totals count them.
        more = {name: most - before[name] for name, most in after.items() if most > before.get(name, most)}
        removed = sum(map(int, REMOVES.findall(_git(root, "log", "-1", "--format=%b", commit))))
        if sum(more.values()) > removed:
            yield f"{commit} raises {', '.join(more)} by {sum(more.values())}, and names {removed} removed lines."


def records() -> list[str]:
    """Return the dataclasses, named tuples and models of all modules that `STARTS` import, however indirectly."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    found = []
    for module in sorted(set(STARTS).union(*map(graph.find_upstream_modules, STARTS))):
        package, *parts = module.split(".")
        path = ROOT.joinpath(PACKAGES[package], *parts)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found += [f"{module}:{name}" for name in _records(ast.parse(file.read_text("utf-8")))]
    return found


def _records(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}
            if bases & RECORD_BASES or any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                yield node.name


if __name__ == "__main__":
    found = list(over())
    print("\n".join(found) or "every folder is within its lines, and a server within its records")
    main = _git(ROOT, "branch", "--show-current").strip() in ("", "main")
    binds = main and os.environ.get("GITHUB_EVENT_NAME") != "pull_request"
    if found and not binds:
        print("::warning::More than budgets.toml allows: review decides, and main ends with an error.")
    sys.exit(bool(found) and binds)
