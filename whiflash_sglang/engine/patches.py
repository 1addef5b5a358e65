"""List SGLang's names that we replace or import, read from our sources: pages and comparisons need no SGLang."""

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages

from whiflash_sglang.engine.patching import Finding, first_sentence

PACKAGE = "whiflash_sglang"
ROOMS = tuple(Path(__file__).parents[1] / room for room in ("engine", "http"))
"""Folders of this package whose modules replace or import SGLang's names."""
BESIDE = "whiflash.names"
"""Group of entry points that names modules of other distributions which replace or import SGLang's names."""


def replaced() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield each replaced name, the parameters that are relied on, and its line on the page of patches."""
    for file, tree in _trees():
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
            for call in function.decorator_list:
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "around":
                    told = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
                    does = first_sentence(ast.get_docstring(function))
                    sentence = f"{does}. Reason: {told['why']}. Until {told['until']}. (`{file}`)"
                    for path in map(ast.literal_eval, call.args):
                        yield path, told.get("params", ()), f"`{path}`: {sentence}"


def imported() -> Iterator[str]:
    """Yield `module:name` for every import from SGLang; a name may be a module."""
    for _, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang"):
                yield from (f"{node.module}:{alias.name}" for alias in node.names)


def _trees() -> Iterator[tuple[str, ast.Module]]:
    packages = {one.value.partition(".")[0] for one in entry_points(group=BESIDE)}
    specs = (find_spec(name) for name in sorted(packages))
    beside = (Path(spec.origin).parent for spec in specs if spec is not None and spec.origin)
    for root in (*ROOMS, *beside):
        for path in sorted(root.rglob("*.py")):
            yield path.relative_to(root.parent).as_posix(), ast.parse(path.read_text("utf-8"))


def missing() -> list[Finding]:
    """Import all our modules that patch SGLang (`ROOMS`), and those that other distributions name (`BESIDE`), so that
    the table has all their patches. Returns a finding for each module that cannot be imported."""
    found = []
    ours = [module.name for room in ROOMS for module in walk_packages([str(room)], f"{PACKAGE}.{room.name}.")]
    for name in (*ours, *(one.value for one in entry_points(group=BESIDE))):
        if name.endswith(".tokenizer_worker"):  # its import reads a launcher's shared memory
            continue
        try:
            import_module(name)
        except Exception as error:  # an import may fail in any way; all of them mean "does not fit"
            found.append(Finding(name, False, f"does not import ({error})"))
    return found
