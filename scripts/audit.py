"""Known weaknesses of what `uv.lock` pins: `python scripts/audit.py`, or `make audit`.

Asks an advisory database over the network, through pip-audit. Ends with 0 where nothing is known but what `ACCEPTED`
lists, 1 where something is, and 2 where no database answered, so that nothing is known.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ACCEPTED: Mapping[str, str] = {}
"""Advisory → why it does not matter here, and what would end that."""


def weaknesses(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Package, version and advisory of each, from pip-audit's report."""
    for package in report["dependencies"]:
        for one in package.get("vulns", ()):
            yield package["name"], package["version"], one["id"]


def judged(found: Iterable[tuple[str, str, str]]) -> list[str]:
    """A line for each that nobody has accepted."""
    return [f"{name} {version}: {advisory}" for name, version, advisory in found if advisory not in ACCEPTED]


def main() -> int:
    uv = shutil.which("uv") or str(Path(".uv/bin/uv"))
    with tempfile.TemporaryDirectory(prefix="audit-") as directory:
        pinned = Path(directory) / "requirements.txt"
        export = ["export", "--frozen", "--all-packages", "--no-emit-workspace", "--no-hashes", "--quiet"]
        subprocess.run([uv, *export, "--output-file", str(pinned)], check=True)
        audit = ["pip-audit", "--requirement", str(pinned), "--no-deps", "--disable-pip", "--format", "json"]
        done = subprocess.run(
            [uv, "tool", "run", *audit, "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        report = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"audit: no advisory database answered, so nothing is known: {reason}", file=sys.stderr)
        return 2
    lines = judged(weaknesses(report))
    print("\n".join(lines) or f"{len(report['dependencies'])} packages, no known weakness")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
