"""`compat/` stands below everything that builds on it: nothing that it imports imports it again."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import whiflash_sglang

PACKAGE = Path(whiflash_sglang.__file__).parent
BELOW = "whiflash_sglang.compat"


def modules() -> dict[str, Path]:
    """Every module of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        dotted = ".".join(("whiflash_sglang", *path.relative_to(PACKAGE).with_suffix("").parts))
        found[dotted.removesuffix(".__init__")] = path
    return found


def imported(source: str, known: Mapping[str, Path]) -> set[str]:
    """Modules of ours that a file imports when it runs, in its functions too; what only type checkers see is left."""
    found = set()
    for node in running(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names} & known.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known.keys()
    return found


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree but the bodies of `if TYPE_CHECKING`."""
    yield tree
    only_types = isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test)
    for child in tree.orelse if only_types and isinstance(tree, ast.If) else ast.iter_child_nodes(tree):
        yield from running(child)


def is_below(module: str) -> bool:
    return module == BELOW or module.startswith(f"{BELOW}.")


def ways_up(imports: Mapping[str, set[str]]) -> list[str]:
    """Each module beside `compat/` that it imports and that leads back to it, with who imports it."""

    def reached(start: str) -> set[str]:
        seen, waiting = {start}, [start]
        while waiting:
            new = imports.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    direct = [
        (user, used) for user, all_used in imports.items() if is_below(user) for used in sorted(all_used)
    ]
    return [
        f"{user} imports {used}, which leads to {', '.join(sorted(filter(is_below, reached(used))))}"
        for user, used in direct
        if not is_below(used) and any(map(is_below, reached(used)))
    ]


def test_compat_imports_nothing_above_it() -> None:
    known = modules()
    assert len(known) > 200
    imports = {name: imported(path.read_text("utf-8"), known) for name, path in known.items()}
    assert "whiflash_sglang.compat.patching" in imports["whiflash_sglang.plugin"]
    assert ways_up(imports) == []


def test_a_way_up_is_found() -> None:
    planted = {
        f"{BELOW}.step": {"whiflash_sglang.round.planning", f"{BELOW}.late"},
        "whiflash_sglang.round.planning": {"whiflash_sglang.arms"},
        "whiflash_sglang.arms": {f"{BELOW}.late"},
    }
    assert ways_up(planted) == [
        f"{BELOW}.step imports whiflash_sglang.round.planning, which leads to {BELOW}.late"
    ]
    planted["whiflash_sglang.arms"] = set()
    assert ways_up(planted) == []
    late = "def late():\n    from whiflash_sglang.round import planning\n"
    assert imported(late, {"whiflash_sglang.round.planning": Path()}) == {"whiflash_sglang.round.planning"}
    types = "if TYPE_CHECKING:\n    from whiflash_sglang.round import planning\n"
    assert imported(types, {"whiflash_sglang.round.planning": Path()}) == set()
