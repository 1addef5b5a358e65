"""Places at which the packages ask whether something is a card's, and those of them that a run comes to."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import whiflash_kernels

import whiflash_sglang

ROOTS = [Path(package.__file__).parents[1] for package in (whiflash_sglang, whiflash_kernels) if package.__file__]
LEFT_OUT = ("cpu", "reference")
"""Folders of what runs on a CPU."""

Place = tuple[str, int]
"""A file below its root, and a line."""


def places_for_cards() -> set[Place]:
    """Lines that compare a device's type with `cuda`, or ask a tensor for `is_cuda`."""
    found = set()
    for root, name in zip(ROOTS, ("whiflash_sglang", "whiflash_kernels"), strict=True):
        left_out = tuple(f"{root / name / part}/" for part in LEFT_OUT)
        for path in sorted((root / name).rglob("*.py")):
            if not str(path).startswith(left_out):
                lines = {node.lineno for node in ast.walk(ast.parse(path.read_text())) if _asks(node)}
                found |= {(path.relative_to(root).as_posix(), line) for line in lines}
    return found


def _asks(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "is_cuda"
    if not (isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr == "type"):
        return False
    return any(isinstance(side, ast.Constant) and side.value == "cuda" for side in node.comparators)


@contextmanager
def reached(places: set[Place]) -> Iterator[set[Place]]:
    """Places of `places` that are come to meanwhile."""
    files = {str(root / path): path for root in ROOTS for path, _ in places if (root / path).is_file()}
    found: set[Place] = set()

    @cache
    def has_places(code: CodeType) -> bool:
        return any((files[code.co_filename], line) in places for _, _, line in code.co_lines())

    def of_file(frame: FrameType, event: str, _: Any) -> Any:
        return of_line if frame.f_code.co_filename in files and has_places(frame.f_code) else None

    def of_line(frame: FrameType, event: str, _: Any) -> Any:
        place = files[frame.f_code.co_filename], frame.f_lineno
        if place in places:
            found.add(place)
        return of_line

    before = sys.gettrace()
    sys.settrace(of_file if places else before)
    try:
        yield found
    finally:
        sys.settrace(before)
