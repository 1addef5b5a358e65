"""Expressions over texts of others take time in proportion to these: each is asked with a megabyte of its worst input.

They are collected from the sources, with the methods that are called on them. Inputs are put together from what a
pattern's parse tree matches: one piece, then one or two others over and over, then an end that no pattern expects.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from re import _parser as parser  # type: ignore[attr-defined]
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("sdk/whiflash_sdk", "whiflash_sglang")
MEGABYTE = 2**20
CPU_SECONDS = 300
"""Bound of all expressions together, which take a fiftieth of it. A quadratic one takes more."""
NOT_ASKED = {
    "whiflash_sglang/train/answers/prompts.py": "the pattern is an argument of the command's own user",
    "whiflash_sglang/lab/bench/arms.py": "names of arms, which the command's own user gives",
    "whiflash_sglang/compat/forward/captured.py": "the text is the source of the installed SGLang",
}
METHODS = {name: {"match"} for name in ("_SPACE", "_COLON", "_COMMA")}
"""Methods of expressions that are handed to a function."""


def expressions() -> Iterator[tuple[str, re.Pattern[Any], str]]:
    """Place, pattern and method. A pattern that is called nowhere by its name is searched for, the most one can do."""
    trees = {path: ast.parse(path.read_text("utf-8")) for of in SOURCES for path in (ROOT / of).rglob("*.py")}
    called: defaultdict[str, set[str]] = defaultdict(set, METHODS)
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and hasattr(re.Pattern, node.attr):
            called[_name(node.value)].add(node.attr)
    for path, tree in trees.items():
        held = {
            id(node.value): _name(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign)
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = ast.unparse(call.func).removeprefix("re.")
            place = f"{path.relative_to(ROOT)}:{call.lineno}"
            if (
                f"re.{function}" == ast.unparse(call.func)
                and function.isidentifier()
                and place.partition(":")[0] not in NOT_ASKED
            ):
                flags = [one.value for one in call.keywords if one.arg == "flags"] or call.args[1:2]
                is_named = function == "compile"
                given = (
                    {"flags": eval(ast.unparse(flags[0]))} if flags and (is_named or call.keywords) else {}
                )
                pattern = re.compile(ast.literal_eval(call.args[0]), **given)
                for method in (called[held.get(id(call), "")] or {"search"}) if is_named else {function}:
                    yield place, pattern, method


def _name(node: Any) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def pieces(tree: Any) -> Iterator[str]:
    """Texts that parts of a pattern match: its literals in a row, and members of its classes."""
    run = ""
    for op, value in [*tree, (None, None)]:
        if op is parser.LITERAL:
            run += chr(value)
            continue
        if run:
            yield run
        run = ""
        if op is parser.RANGE:
            yield chr(value[0])
        elif op is parser.IN:
            for one in value:
                yield from pieces([one])
        elif isinstance(value, list | tuple):
            for one in (part for parts in value for part in (parts if isinstance(parts, list) else [parts])):
                yield from pieces(one) if isinstance(one, parser.SubPattern) else ()


def ask(pattern: re.Pattern[Any], method: str, text: str) -> float:
    """Seconds of this process."""
    given: Any = text.encode("latin-1", "replace") if isinstance(pattern.pattern, bytes) else text
    before = process_time()
    found = getattr(pattern, method)(*((given[:0],) if method == "sub" else ()), given)
    if method == "finditer":
        list(found)
    return process_time() - before


def ask_all() -> None:
    """For a process of its own, since an expression cannot be stopped: the last line names the one that did not end."""
    for place, pattern, method in expressions():
        text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
        known = [*dict.fromkeys([*pieces(parser.parse(text, pattern.flags & ~re.UNICODE)), *" \n0a"])][:24]
        units = [*known, *map("".join, product(known, known))]
        print(f"{place} {method} {text!r}", flush=True)
        cost = {
            (first, unit): ask(pattern, method, first + unit * (2**10 // len(unit)) + "\0")
            for first, unit in product(["", *known], units)
        }
        for first, unit in sorted(cost, key=cost.__getitem__)[-3:]:
            print(f"  {first!r} and {unit!r} over and over", flush=True)
            ask(pattern, method, first + unit * (MEGABYTE // len(unit)) + "\0")
    print("all")


def test_every_expression_takes_a_megabyte_of_its_worst_input() -> None:
    bound = f"import resource as r; r.setrlimit(r.RLIMIT_CPU, ({CPU_SECONDS},) * 2)"
    line = [sys.executable, "-c", f"{bound}; import test_expressions; test_expressions.ask_all()"]
    done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout.endswith("all\n"), done.stdout[-500:] + done.stderr[-2000:]
