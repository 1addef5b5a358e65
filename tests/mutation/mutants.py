"""Single faults planted into a module's source: cosmic-ray's operators, and statements left out.

Mutants that change only docstrings, annotations or decorators of classes (`frozen`, `slots`) are not generated: no test
should tell them from the original.
"""

import ast
import random
from collections.abc import Iterator

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator
from planted import Mutant

STANDARD = (
    *("AddNot", "NumberReplacer", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_USub"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul")),
    *(f"ReplaceBinaryOperator_{pair}" for pair in ("FloorDiv_Mul", "Mod_FloorDiv", "BitOr_BitAnd", "BitAnd_BitOr")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq")),
    *(f"ReplaceComparisonOperator_{pair}" for pair in ("NotEq_Eq", "Is_IsNot", "IsNot_Is")),
)
"""Operators, of cosmic-ray's 213, whose faults people make; the others replace every operator by every other."""


class DeleteStatement(Operator):  # type: ignore[misc]
    """Leaves a simple statement out: a call, an assignment, a raise, a return."""

    KINDS = ("expr_stmt", "atom_expr", "raise_stmt", "return_stmt", "assert_stmt", "del_stmt")

    def mutation_positions(self, node: parso.tree.NodeOrLeaf) -> Iterator[tuple[object, object]]:
        """The statement's place; a declaration without a value is none."""
        statement = node.children[0] if node.type == "simple_stmt" else None
        if statement is not None and statement.type in self.KINDS and not _is_declaration(statement):
            yield node.start_pos, node.end_pos

    def mutate(self, node: parso.tree.NodeOrLeaf, index: int) -> parso.tree.NodeOrLeaf:
        """`pass` in its place."""
        statement = node.children[0]
        node.children[0] = parso.python.tree.Keyword("pass", statement.start_pos, statement.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """None."""
        return ()


def _is_declaration(node: parso.tree.NodeOrLeaf) -> bool:
    return node.type == "expr_stmt" and node.children[1].type == "annassign" and len(node.children[1].children) == 2


def mutants(module: str, source: str) -> list[Mutant]:
    """All mutants of a module's source, in order of place."""
    original, lines = _meaning(source), source.splitlines()
    found: list[Mutant] = []
    seen: dict[str, int] = {}
    operators = [(name, get_operator(f"core/{name}")()) for name in STANDARD] + [("DeleteStatement", DeleteStatement())]
    for name, operator in operators:
        for occurrence, line in enumerate(_lines_of(operator, source)):
            mutated = mutate_code(source, operator, occurrence)
            if mutated is None or (meaning := _meaning(mutated)) is None or meaning == original:
                continue
            label = f"{name}: {lines[line - 1].strip()}"
            seen[label] = seen.get(label, 0) + 1
            found.append(Mutant(module, label if seen[label] == 1 else f"{label} [{seen[label]}]", line, mutated))
    return sorted(found, key=lambda mutant: (mutant.line, mutant.name))


def sample(module: str, source: str, most: int) -> list[Mutant]:
    """At most `most` mutants, the same ones while the source is the same."""
    found = mutants(module, source)
    if len(found) <= most:
        return found
    return sorted(random.Random(module).sample(found, most), key=lambda mutant: (mutant.line, mutant.name))


def _lines_of(operator: Operator, source: str) -> list[int]:
    return [start[0] for node in ast_nodes(get_ast(source)) for start, _ in operator.mutation_positions(node)]


def _meaning(source: str) -> str | None:
    """The program without docstrings and annotations; None where it is no program."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.ClassDef):
            node.decorator_list = []  # frozen, slots and the like
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
