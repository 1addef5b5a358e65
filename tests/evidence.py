"""Full matrices, one JSON file per cell, resumable: `make evidence`.

A cell that was measured on the same code is kept. A record says how it came about: the command, the revision, a
digest of the code that it depends on, versions and hardware. `results/evidence/README.md` is written from the records.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from whiflash_sglang.files.jsonl import write_whole
from whiflash_sglang.files.provenance import made_by

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "evidence" / "records"
SUMMARY = ROOT / "results" / "evidence" / "README.md"

RELEVANT = (
    *("arms", "cache", "checkpoints", "copying", "device", "drafts", "engine", "formats", "prices"),
    *("records", "round", "routing", "serve", "structure"),
)
"""Parts of `whiflash_sglang` that decide what is generated, beside `whiflash_kernels` and `whiflash_cpu`."""

AREAS = {
    "greedy-embedded": "Greedy losslessness, embedded target, fp32",
    "greedy-tiny": "Greedy losslessness, tiny target, fp32",
    "sampling": "Sampling, joint distribution of four tokens: p-values of χ² tests",
    "plain-embedded": "Plain decoding, embedded target, fp32: the reference of its cells",
}
"""Directories of `records/`, and their titles in the summary, in its order."""

PACKAGES = ("sglang", "torch", "transformers", "xgrammar", "whiflash-sglang", "whiflash-kernels")

Result = dict[str, Any]


@cache
def code_digest() -> str:
    """Digest of the sources that results depend on, as they are on the disk."""
    digest = hashlib.sha256()
    package = ROOT / "whiflash_sglang"
    files = [ROOT / "cpu" / "whiflash_cpu", ROOT / "kernels" / "whiflash_kernels"] + [
        package / part for part in RELEVANT
    ]
    for path in sorted(_sources(files)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _sources(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        yield from path.rglob("*.py") if path.is_dir() else [path]


def cell(area: str, name: str, measure: Callable[[], Result]) -> Result:
    """The result of `measure`, from the record where the code is still the same; otherwise it is measured now.

    `area` is a key of `AREAS`.
    """
    path = RESULTS / area / f"{name}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["code_digest"] == code_digest():
            return dict(record["result"])
    began = time.monotonic()
    result = measure()
    _write(
        path,
        {
            "area": area,
            "cell": name,
            "result": result,
            "seconds": round(time.monotonic() - began, 1),
            "code_digest": code_digest(),
            **provenance(),
        },
    )
    return result


def provenance() -> Result:
    """Provenance of a record."""
    made = made_by(PACKAGES)
    return {
        "command": " ".join(["pytest", *sys.argv[1:]]),
        "commit": made["revision"],
        "clean": _git("status", "--porcelain", "--", "whiflash_sglang", "cpu/whiflash_cpu", "kernels/whiflash_kernels")
        == "",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": made["python"],
        "versions": made["packages"],
        "hardware": f"{made['hardware']['cpu']}, {made['hardware']['cores']} cores",
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2) + "\n")


def write_summary() -> None:
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    SUMMARY.write_text(summary())


def summary() -> str:
    """`results/evidence/README.md`: a table per area, and the commits and machines of its records.

    Sampling shows each parameter's p-value.
    """
    areas = {area: [json.loads(p.read_text()) for p in sorted((RESULTS / area).glob("*.json"))] for area in AREAS}
    lines = [
        "# Evidence",
        "",
        "`make evidence` writes this page from the records in `records/`. Each names its commit, a digest of the code,",
        "versions and hardware. A cell is measured again if that code changes.",
    ]
    for area, records in areas.items():
        commits = sorted({r["commit"][:9] + ("" if r["clean"] else " + changes") for r in records})
        table = _table({r["cell"]: r["result"] for r in records})
        lines += ["", f"## {AREAS[area]}", "", *table, "", f"Commits: {', '.join(commits)}."]
    made = {(r["hardware"], r["python"], *sorted(r["versions"].items())) for rs in areas.values() for r in rs}
    lines += ["", "## Made on", ""]
    for hardware, python, *versions in sorted(made):
        lines.append(f"- {hardware}; Python {python}; " + ", ".join(f"{name} {v}" for name, v in versions))
    return "\n".join(lines) + "\n"


def _table(results: Mapping[str, Result]) -> Iterator[str]:
    shown = (key for result in results.values() for key, value in result.items() if not isinstance(value, dict))
    columns = list(dict.fromkeys(shown))
    yield _row(["cell", *columns])
    yield _row(["---"] * (len(columns) + 1))
    for name, result in results.items():
        yield _row([name, *(_shown(result.get(column, "")) for column in columns)])


def _row(values: Iterable[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _shown(value: Any) -> str:
    """Text of a value; of a χ² test, which is a list, its p-value."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value[-1]).removeprefix("p ") if isinstance(value, list) else str(value)


if __name__ == "__main__":
    write_summary()
    sys.stdout.write(f"{SUMMARY}\n")
