"""Faults planted by hand: in the Triton kernels, where most of what operators change is a size that nobody sees.

`planted.toml` has of each function what is wrong, the text that is replaced (it is there once), and the new one.
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
    faults = tomllib.loads((HERE / "planted.toml").read_text("utf-8")).get(Path(module).name, {})
    found = []
    for name, by_fault in faults.items():
        begin, end = _place(source, name)
        function = source[begin:end]
        for fault, (old, new) in by_fault.items():
            if (times := function.count(old)) != 1:
                raise ValueError(f"{module}, {name}: {old!r} is there {times} times, not once")
            at = begin + function.index(old)
            harmed = source[:at] + new + source[at + len(old) :]
            found.append(Mutant(module, fault, source.count("\n", 0, at) + 1, harmed, name))
    return found


def _place(source: str, function: str) -> tuple[int, int]:
    """Beginning and end of a function's text. Raises ValueError if there is none of that name."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            assert node.end_lineno is not None
            return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))
    raise ValueError(f"no function {function}")
