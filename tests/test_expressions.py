"""Expressions over texts of others take time in proportion to these: each is asked with a megabyte of its worst input.

They are collected from the sources. Inputs are put together from texts that parts of a pattern match: one, then one or
two others over and over, then an end that no pattern expects.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from re import _parser as parser  # type: ignore[attr-defined]
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("sdk/whiflash_sdk", "whiflash_sglang", "cpu/whiflash_cpu", "lab/whiflash_lab", "train/whiflash_train")
CPU_SECONDS = 300
"""Bound of all expressions together, which take a fiftieth of it. A quadratic one takes more."""
NOT_ASKED = {
    "train/whiflash_train/answers/prompts.py": "the pattern is an argument of the command's own user",
    "lab/whiflash_lab/bench/arms.py": "names of arms, which the command's own user gives",
    "whiflash_sglang/engine/forward/captured.py": "the text is the source of the installed SGLang",
}


def expressions() -> Iterator[tuple[str, re.Pattern[Any], str]]:
    """Place, pattern and method. A pattern that is called nowhere by its name is searched for, the most one can do."""
    texts = {path: path.read_text("utf-8") for of in SOURCES for path in (ROOT / of).rglob("*.py")}
    for path, text in texts.items():
        place, nodes = path.relative_to(ROOT).as_posix(), list(ast.walk(ast.parse(text)))
        held = {
            id(one.value): ast.unparse(one.targets[0] if isinstance(one, ast.Assign) else one.target)
            for one in nodes
            if isinstance(one, ast.Assign | ast.AnnAssign)
        }
        for call in (one for one in nodes if isinstance(one, ast.Call) and place not in NOT_ASKED):
            if function := re.fullmatch(r"re\.(?!escape)(\w+)", ast.unparse(call.func)):
                flags = [one.value for one in call.keywords if one.arg == "flags"]
                flags += call.args[1:2] if function[1] == "compile" else []
                pattern = re.compile(ast.literal_eval(call.args[0]), *(eval(ast.unparse(one)) for one in flags))
                used = rf"\b{held.get(id(call), '-')}\.((?:full)?match|search|sub|split|find\w+)\("
                methods = set(re.findall(used, "".join(texts.values()))) or {"search"}
                for method in methods if function[1] == "compile" else {function[1]}:
                    yield f"{place}:{call.lineno}", pattern, method


def pieces(tree: Any) -> Iterator[str]:
    """Texts that parts of a pattern match: its literals in a row, and members of its classes."""
    run = ""
    for op, value in [*tree, (None, None)]:
        if op is parser.LITERAL:
            run += chr(value)
            continue
        yield from filter(None, (run, chr(value[0]) if op is parser.RANGE else ""))
        run = ""
        if op is parser.IN:
            yield from (piece for one in value for piece in pieces([one]))
        elif isinstance(value, list | tuple):
            for one in (part for parts in value for part in (parts if isinstance(parts, list) else [parts])):
                yield from pieces(one) if isinstance(one, parser.SubPattern) else ()


def ask(pattern: re.Pattern[Any], method: str, first: str, unit: str, size: int) -> float:
    """Seconds of this process."""
    text = first + unit * (size // len(unit)) + "\0"
    given: Any = text.encode("latin-1", "replace") if isinstance(pattern.pattern, bytes) else text
    before = process_time()
    found = getattr(pattern, method)(*((given[:0],) if method == "sub" else ()), given)
    list(found) if method == "finditer" else found
    return process_time() - before


def ask_all() -> None:
    """For a process of its own, since an expression cannot be stopped: the last line names the one that did not end."""
    for place, pattern, method in expressions():
        text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
        known = [*dict.fromkeys([*pieces(parser.parse(text, pattern.flags & ~re.UNICODE)), *" \n0a"])][:24]
        inputs = list(product(["", *known], [*known, *map("".join, product(known, known))]))
        cost = {one: ask(pattern, method, *one, 2**10) for one in inputs}
        for one in sorted(inputs, key=cost.__getitem__)[-3:]:
            print(place, method, repr(text), *map(repr, one), flush=True)
            ask(pattern, method, *one, 2**20)
    print("all")


def test_every_expression_takes_a_megabyte_of_its_worst_input() -> None:
    bound = f"import resource as r; r.setrlimit(r.RLIMIT_CPU, ({CPU_SECONDS},) * 2)"
    line = [sys.executable, "-c", f"{bound}; import test_expressions; test_expressions.ask_all()"]
    done = subprocess.run(line, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout.endswith("all\n"), done.stdout[-500:] + done.stderr[-2000:]
