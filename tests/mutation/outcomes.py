"""Outcomes of every mutant: kept as they come, and counted."""

import json
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"


@dataclass(frozen=True, slots=True)
class Result:
    """The tests' verdict on one mutant.

    digest: that of the mutated source, so that changed code is asked again. part: its function, if a person planted it.
    """

    module: str
    name: str
    line: int
    outcome: str
    seconds: float
    digest: str
    part: str = ""


def read(path: Path) -> list[Result]:
    """Results kept so far."""
    return [Result(**json.loads(line)) for line in path.read_text().split("\n") if line] if path.exists() else []


def reasons() -> dict[str, str]:
    """Reasons of survivors.toml: why a mutant that survives may, by `module :: name`."""
    path = HERE / "survivors.toml"
    found = tomllib.loads(path.read_text()) if path.exists() else {}
    return {f"{module} :: {name}": why for module, names in found.items() for name, why in names.items()}


def report(results: Sequence[Result]) -> str:
    """Score by module (by function, where faults are planted by hand), and the survivors with their reasons."""
    by_module: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_module[f"`{result.module}`" + (result.part and f" `{result.part}`")].append(result)
    why = reasons()
    lines = ["| module | faults | killed | score |", "|---|---|---|---|"]
    for module, found in sorted(by_module.items()):
        lines.append(_row(module, found))
    lines += [_row("all", results), ""]
    for result in results:
        if result.outcome == SURVIVED:
            reason = why.get(f"{result.module} :: {result.name}", "**no reason yet**")
            lines.append(f"- `{result.module}:{result.line}` {result.name}: {reason}")
    return "\n".join(lines)


def _row(name: str, results: Sequence[Result]) -> str:
    killed = sum(result.outcome != SURVIVED for result in results)
    return f"| {name} | {len(results)} | {killed} | {killed / max(len(results), 1):.0%} |"
