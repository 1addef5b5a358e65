"""Every place where SGLang asks whether an algorithm is set is in `docs/dev/conditions.md`, decided.

A condition counts if it answers otherwise for WHIFLASH than for no algorithm. The sources are read, not imported.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from whiflash_sglang.engine.carried import ALGORITHM

FIELD = "speculative_algorithm"
OTHERS = ("speculative/", "hardware_backend/")
"""SGLang's own algorithms, and accelerators that WHIFLASH does not serve on."""
COMPARED: dict[type, Any] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def told_apart() -> set[str]:
    """Questions to an algorithm that have another answer for none."""
    load_plugins()
    ours, none = SpeculativeAlgorithm.from_string(ALGORITHM), SpeculativeAlgorithm.NONE
    names = [name for name in vars(SpeculativeAlgorithm) if name.startswith(("is_", "supports_", "has_", "carries_"))]
    return {name for name in names if getattr(ours, name)() != getattr(none, name)()}


class Conditions(ast.NodeVisitor):
    """Finds them in a module, by function."""

    def __init__(self, questions: set[str]) -> None:
        self.found: Counter[str] = Counter()
        self._questions, self._scope = questions, [""]
        self._names: list[set[str]] = [{FIELD}]
        """Variables of a function that hold the algorithm's name."""

    def visit_ClassDef(self, node: Any) -> None:
        self._scope.append(f"{self._scope[-1]}.{node.name}".strip("."))
        self._names.append(set(self._names[-1]))
        self.generic_visit(node)
        self._scope.pop()
        self._names.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef  # noqa: N815 -- ast's names

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if self._is_name(node.value):
            self._names[-1] |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    def visit_Call(self, node: ast.Call) -> None:
        method = node.func
        if isinstance(method, ast.Attribute) and method.attr in self._questions:
            self._note("a2a" not in ast.unparse(method.value))  # transports answer `is_none` too
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if self._is_name(node.left):
            self._note(_differs(node))
        self.generic_visit(node)

    def visit_If(self, node: Any) -> None:
        self._note(self._is_name(node.test))
        self.generic_visit(node)

    visit_IfExp = visit_While = visit_Assert = visit_If  # noqa: N815

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        if not self._is_name(node):
            for value in node.values:
                self._note(self._is_name(value))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._note(isinstance(node.op, ast.Not) and self._is_name(node.operand))
        self.generic_visit(node)

    def _note(self, found: bool) -> None:
        self.found[self._scope[-1]] += found

    def _is_name(self, node: ast.AST) -> bool:
        """Whether it is the algorithm's name, in capitals or not, or a default for none."""
        match node:
            case ast.Attribute(attr=name):
                return name == FIELD
            case ast.Name(id=name):
                return name in self._names[-1]
            case ast.Call(func=ast.Attribute(value=value, attr="upper" | "lower")):
                return self._is_name(value)
            case ast.Call(func=ast.Name(id="str"), args=[value]):
                return self._is_name(value)
            case ast.BoolOp(op=ast.Or(), values=[value, ast.Constant()]):
                return self._is_name(value)
            case ast.IfExp(body=value):
                return self._is_name(value)
        return False


def _differs(node: ast.Compare) -> bool:
    """True if it is compared with what only runs know, except a name of SGLang's own."""
    [operation], [right] = node.ops, node.comparators
    if ast.unparse(right).startswith("SpeculativeAlgorithm."):
        return False
    try:
        value = ast.literal_eval(right)
    except ValueError:
        return True
    compared = COMPARED[type(operation)]
    return bool(compared(None, value) != compared(ALGORITHM, value))


def in_sources(questions: set[str]) -> Iterator[tuple[tuple[str, str], int]]:
    root = Path(str(files("sglang"))) / "srt"
    for path in sorted(root.rglob("*.py")):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if not name.startswith(OTHERS) and any(asked in text for asked in (FIELD, *questions)):
            conditions = Conditions(questions)
            conditions.visit(ast.parse(text))
            yield from (((name, function), times) for function, times in conditions.found.items() if times)


def rows() -> list[list[str]]:
    lines = (Path(__file__).parents[2] / "docs" / "dev" / "conditions.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]


@pytest.mark.newest
def test_every_condition_is_decided() -> None:
    listed = {(file, function): int(times) for file, function, times, _, _ in rows()}
    assert listed == {(file, function or "(module)"): times for (file, function), times in in_sources(told_apart())}
    assert {row[3] for row in rows()} == {"ours", "plain", "400", "refused", "foreign", "figures", "slower"}
    assert all(row[4] for row in rows())
