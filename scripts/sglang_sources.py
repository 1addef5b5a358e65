"""The sources of a release of SGLang, and names in them as Python would find them: nothing is imported."""

import ast
import hashlib
import re
import textwrap
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FLAGS = "sglang.srt.arg_groups.fields"
"""The package whose classes hold a server's arguments as fields."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Tree:
    """The sources of a release of SGLang by module, read from a wheel or from a directory that contains `sglang/`."""

    def __init__(self, place: Path) -> None:
        self._wheel = zipfile.ZipFile(place) if place.is_file() else None
        if self._wheel:
            paths = self._wheel.namelist()
        else:
            paths = [path.relative_to(place).as_posix() for path in place.glob("sglang/**/*.py")]
        self._place = place
        self._texts: dict[str, str] = {}
        self._paths = {module_of(path): path for path in paths if re.fullmatch(r"sglang/.*\.py", path)}
        if not self._paths:
            raise ValueError(f"{place} holds no sglang")

    def modules(self) -> Iterator[str]:
        yield from self._paths

    def source(self, module: str) -> str | None:
        """Return the source of a module; None if there is no such module."""
        path = self._paths.get(module)
        if path is None:
            return None
        if module not in self._texts:
            raw = self._wheel.read(path) if self._wheel else (self._place / path).read_bytes()
            self._texts[module] = raw.decode("utf-8")
        return self._texts[module]

    def is_package(self, module: str) -> bool:
        return self._paths.get(module, "").endswith("/__init__.py")


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class Found(NamedTuple):
    """The definition that a name leads to. module: in which it is. node: None if the source does not show it."""

    module: str
    node: ast.AST | None


class Walker:
    """Looks names up in a `Tree`, through imports and base classes, as Python would."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def body(self, module: str) -> list[ast.stmt] | None:
        """Return the statements of a module; None if there is no such module."""
        source = self.tree.source(module)
        return None if source is None else parsed(source)

    def find(self, path: str) -> Found | None:
        """Return the definition of `module:attribute.path`; None if it is missing."""
        module, _, attributes = path.partition(":")
        first, *rest = attributes.split(".")
        found = self._global(module, first)
        for name in rest:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return found and Found(found.module, None)
            found = self._member(found.module, found.node, name)
        return found

    def _global(self, module: str, name: str, depth: int = 0) -> Found | None:
        """Return the definition of a module's name, through imports; None if it is missing."""
        body = self.body(module)
        if body is None or depth > 8:
            return None
        # A class may be handed through a function and assigned to its own name: what it is, the class says.
        last_first = list(flat(body))[::-1]
        for node in sorted(last_first, key=lambda one: isinstance(one, ast.Assign)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._imported(module, node, alias.name, depth)
                    if alias.name == "*" and (found := self._imported(module, node, name, depth)):
                        return found
            elif defines(node, name):
                return Found(module, node)
        return Found(module, None) if self.tree.source(f"{module}.{name}") is not None else None

    def _imported(self, module: str, node: ast.ImportFrom, name: str, depth: int) -> Found | None:
        package = module if self.tree.is_package(module) else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        source = ".".join(filter(None, (package if node.level else None, node.module)))
        if not source.startswith("sglang"):
            return Found(module, None)  # somebody else's
        return self._global(source, name, depth + 1)

    def _member(self, module: str, owner: ast.ClassDef, name: str, depth: int = 0) -> Found | None:
        """Return a member of a class or its bases, without a node if only a method sets it; None if missing."""
        for node in flat(owner.body):
            if defines(node, name):
                return Found(module, node)
        for base in self._bases(module, owner, depth):
            if base.node is None:
                return base  # somebody else's class: it may have the name
            if found := self._member(base.module, base.node, name, depth + 1):  # type: ignore[arg-type]
                return found
        sets = any(isinstance(n, ast.Attribute) and n.attr == name and _stored(n) for n in ast.walk(owner))
        return Found(module, None) if sets else None

    def _bases(self, module: str, owner: ast.ClassDef, depth: int) -> Iterator[Found]:
        for base in owner.bases if depth < 8 else ():
            found = self._global(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None and (found.node is None or isinstance(found.node, ast.ClassDef)):
                yield found

    def parameters(self, found: Found) -> list[str] | None:
        """Return the parameters of a function or of a class's initialiser; None if the source does not show them."""
        if isinstance(found.node, Function):
            arguments = found.node.args
            plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            return [one.arg for one in (*plain, arguments.vararg, arguments.kwarg) if one is not None]
        if isinstance(found.node, ast.ClassDef):
            made = any("dataclass" in ast.dump(decorator) for decorator in found.node.decorator_list)
            init = None if made else self._member(found.module, found.node, "__init__")
            if init is not None and isinstance(init.node, Function):
                return (self.parameters(init) or [])[1:]
            return list(dict.fromkeys(self._fields(found.module, found.node, 0)))
        return None

    def _fields(self, module: str, owner: ast.ClassDef, depth: int) -> Iterator[str]:
        for base in self._bases(module, owner, depth):
            if isinstance(base.node, ast.ClassDef):
                yield from self._fields(base.module, base.node, depth + 1)
        yield from annotated(owner)

    def describe(self, path: str) -> dict[str, Any] | None:
        """Return a name's kind, parameters and digest, as `upstream.json` has them; None if it is missing."""
        found = self.find(path)
        if found is None:
            return None
        kind = "value"
        if found.node is None:
            return {"kind": "unclear"}
        if isinstance(found.node, Function):
            kind = "function"
        elif isinstance(found.node, ast.ClassDef):
            kind = "class"
        told: dict[str, Any] = {"kind": kind}
        if (parameters := self.parameters(found)) is not None:
            told["parameters"] = parameters
        if kind == "function":
            told["digest"] = hashlib.sha256(self.text(found).encode()).hexdigest()[:16]
        return told

    def text(self, found: Found) -> str:
        """Return a function's lines without comments, docstring and empty lines."""
        node = found.node
        assert isinstance(node, Function)
        lines = (self.tree.source(found.module) or "").split("\n")
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        skipped: set[int] = set()
        said = node.body[0]
        if isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant) and isinstance(said.value.value, str):
            skipped = set(range(said.lineno, (said.end_lineno or said.lineno) + 1))
        kept = [
            lines[number - 1].rstrip()
            for number in range(first, (node.end_lineno or node.lineno) + 1)
            if number not in skipped and not re.fullmatch(r"\s*(#.*)?", lines[number - 1])
        ]
        return textwrap.dedent("\n".join(kept))

    def flags(self) -> list[str]:
        """Return the names of a server's arguments, sorted."""
        names: set[str] = set()
        for module in self.tree.modules():
            if module.startswith(f"{FLAGS}."):
                for node in self.body(module) or ():
                    if isinstance(node, ast.ClassDef):
                        names |= set(annotated(node))
        return sorted(names)

    def others(self, path: str) -> list[str]:
        """Return the modules that define a function or class with the last name in `path`: it may have moved."""
        name = re.split(r"[:.]", path)[-1]
        pattern = re.compile(rf"^\s*(?:async def|def|class) {re.escape(name)}\b", re.MULTILINE)
        return [module for module in self.tree.modules() if pattern.search(self.tree.source(module) or "")]


@cache
def parsed(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, and those under its `if`, `try` and `with` statements."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from flat(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from flat(handler.body)


def defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(one, ast.Name) and one.id == name for target in targets for one in ast.walk(target))


def annotated(owner: ast.ClassDef) -> Iterator[str]:
    for node in owner.body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and "ClassVar" not in ast.dump(node.annotation)
        ):
            yield node.target.id


def _stored(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store)
