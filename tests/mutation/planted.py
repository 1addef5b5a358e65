"""Faults planted by hand: in the Triton kernels, where most of what operators change is a size that nobody sees.

`planted.toml` names a function, what is wrong with it, and the text that is replaced, which the function has once.
"""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault. `name` stays the same while the line's text does: `operator: line of source [nth of its kind]`, or
    what is wrong where a hand has planted it; `part` is then the function that it lies in.
    """

    module: str
    name: str
    line: int
    source: str
    part: str = ""


def planted(module: str, source: str) -> list[Mutant]:
    """Every fault of planted.toml in a module. Raises ValueError naming one whose text is not there once."""
    with (HERE / "planted.toml").open("rb") as file:
        faults = [fault for fault in tomllib.load(file)["fault"] if fault["module"] == Path(module).name]
    found = []
    for fault in faults:
        begin, end = _place(source, fault["function"])
        function = source[begin:end]
        if function.count(fault["old"]) != 1:
            times = function.count(fault["old"])
            raise ValueError(
                f"{module}, {fault['function']}: {fault['old']!r} is there {times} times, not once"
            )
        at = begin + function.index(fault["old"])
        harmed = source[:at] + fault["new"] + source[at + len(fault["old"]) :]
        line = source.count("\n", 0, at) + 1
        found.append(Mutant(module, fault["fault"], line, harmed, fault["function"]))
    return found


def _place(source: str, function: str) -> tuple[int, int]:
    """Beginning and end of a function's text. Raises ValueError if there is none of that name."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            assert node.end_lineno is not None
            return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))
    raise ValueError(f"no function {function}")
