"""Known weaknesses of what `uv.lock` pins: `python scripts/audit.py`, or `make audit`.

Asks an advisory database over the network, through pip-audit. Ends with 0 where nothing is known but what `ACCEPTED`
lists, 1 where something is, and 2 where no database answered, or it knows few of the packages.
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
MOST_UNKNOWN = 0.5
"""Share of packages that a database may not know; with more it is no answer."""


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
    packages, lines = report["dependencies"], judged(weaknesses(report))
    unknown = [one["name"] for one in packages if "vulns" not in one]
    if len(unknown) > MOST_UNKNOWN * len(packages) or not packages:
        print(
            f"audit: the database knows {len(packages) - len(unknown)} of {len(packages)} packages",
            file=sys.stderr,
        )
        return 2
    beside = f"; unknown to the database: {', '.join(unknown)}" if unknown else ""
    print("\n".join(lines) or f"{len(packages) - len(unknown)} packages, no known weakness{beside}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
