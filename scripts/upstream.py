"""What a release of SGLang has moved of the names that we import, call or replace: `python scripts/upstream.py 0.5.24`.

Takes a wheel, an unpacked tree, or a version, which is fetched. Sources are read, nothing is imported
(`sglang_sources.py`). `scripts/upstream.json` holds what was found in the version that this release is for (`--record`
writes it anew). What each finding asks for: docs/reference/versions.md.
"""

import argparse
import difflib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sglang_sources import Function, Tree, Walker

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "scripts" / "upstream.json"


def recorded_names() -> list[str]:
    """Every name of SGLang's that we import, call or replace. Imports the tables, and so torch and SGLang."""
    from whiflash_sglang.compat.patching import PRIVATE_NAMES
    from whiflash_sglang.platform import seams

    names = [name.path for name in PRIVATE_NAMES]
    plain = (*seams.EARLY_SEAMS, *seams.SEAMS, *seams.MODULE_SEAMS)
    names += [f"{seam.module}:{seam.name}" for seam in plain]
    names += [f"{seam.module}:{seam.owner}.{seam.name}" for seam in seams.METHOD_SEAMS]
    return sorted(set(names))


def record(tree: Tree, version: str, names: list[str]) -> dict[str, Any]:
    walker = Walker(tree)
    return {
        "sglang": version,
        "names": {path: walker.describe(path) for path in names},
        "flags": walker.flags(),
    }


class Finding(NamedTuple):
    """kind: `missing`, `parameters`, `changed`, `unclear` or `flags`."""

    kind: str
    name: str
    detail: str


def compare(tree: Tree, known: Mapping[str, Any]) -> list[Finding]:
    """What of the record is otherwise in `tree`."""
    walker = Walker(tree)
    findings = [
        finding
        for path, before in known["names"].items()
        if before is not None
        for finding in _judge(walker, path, before)
    ]
    added, gone = differing(known["flags"], walker.flags())
    findings += [Finding("flags", name, "new") for name in added]
    findings += [Finding("flags", name, "gone") for name in gone]
    return findings


def _judge(walker: Walker, path: str, before: Mapping[str, Any]) -> Iterator[Finding]:
    now = walker.describe(path)
    if now is None:
        elsewhere = walker.others(path)
        told = f"moved? defined in {', '.join(elsewhere[:5])}" if elsewhere else "defined nowhere"
        yield Finding("missing", path, told)
    elif now["kind"] != before["kind"]:
        kind = "unclear" if now["kind"] == "unclear" else "changed"
        yield Finding(kind, path, f"was a {before['kind']}, is a {now['kind']}")
    elif now.get("parameters") != before.get("parameters"):
        added, gone = differing(before["parameters"], now["parameters"])
        told = [f"lost {', '.join(gone)}"] if gone else []
        told += [f"takes {', '.join(added)} too"] if added else []
        yield Finding("parameters", path, "; ".join(told) or "in another order")
    elif now.get("digest") != before.get("digest"):
        yield Finding("changed", path, "written differently")


def differing(before: list[str], now: list[str]) -> tuple[list[str], list[str]]:
    """What was added, and what is gone."""
    return [one for one in now if one not in before], [one for one in before if one not in now]


def difference(path: str, old: Tree, new: Tree) -> str:
    """How a function was changed."""
    texts = []
    for tree in (old, new):
        walker = Walker(tree)
        found = walker.find(path)
        texts.append(walker.text(found).split("\n") if found and isinstance(found.node, Function) else [])
    return "\n".join(difflib.unified_diff(*texts, "before", "now", lineterm=""))


def installed() -> Tree:
    """The sources of the SGLang that is installed; nothing of it is imported."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.submodule_search_locations is None:
        raise ValueError("no SGLang is installed")
    return Tree(Path(next(iter(found.submodule_search_locations))).parent)


@contextmanager
def sources(said: str) -> Iterator[Path]:
    """A wheel or directory as it is; a version, fetched into a directory that ends with the block."""
    if Path(said).exists():
        yield Path(said)
        return
    uv = shutil.which("uv") or ROOT / ".uv" / "bin" / "uv"
    with tempfile.TemporaryDirectory() as folder:
        command = [str(uv), "pip", "install", "--quiet", "--no-deps", "--target", folder, f"sglang=={said}"]
        subprocess.run(command, check=True)
        yield Path(folder)


def imported(place: Path) -> list[str]:
    """What the server's own check of names and seams says of these sources, beside all else that is installed."""
    code = (
        "import json; from whiflash_sglang.compat.patching import verify_names\n"
        "from whiflash_sglang.platform.seams import verify_seams\n"
        "found = [*verify_names()[1:], *verify_seams()]\n"
        "print(json.dumps([f'{one.name}: {one.detail}' for one in found if not one.ok]))"
    )
    paths = [str(place), *(str(ROOT / part) for part in ("", "kernels", "sdk"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        return [done.stderr.strip().split("\n")[-1]]
    return list(json.loads(done.stdout.strip().split("\n")[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", nargs="?", help="a wheel, a directory that holds sglang/, or a version")
    parser.add_argument(
        "--record", action="store_true", help="record the installed SGLang; for after a change of the pin"
    )
    parser.add_argument(
        "--diff", action="store_true", help="show how functions differ from the installed SGLang's"
    )
    parser.add_argument(
        "--import", action="store_true", dest="imported", help="import the new sources, and check them"
    )
    said = parser.parse_args()
    if said.record:
        from whiflash_sglang.compat.patching import SGLANG_VERSION

        written = record(installed(), SGLANG_VERSION, recorded_names())
        RECORD.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
        print(f"{RECORD.name}: {len(written['names'])} names of SGLang {SGLANG_VERSION}")
        return 0
    if not said.release:
        parser.error("which release?")
    known = json.loads(RECORD.read_text("utf-8"))
    with sources(said.release) as place:
        tree = Tree(place)
        findings = compare(tree, known)
        for finding in findings:
            print(f"{finding.kind:<12}{finding.name}: {finding.detail}")
            if said.diff and finding.kind in ("changed", "parameters"):
                print(textwrap.indent(difference(finding.name, installed(), tree), "    "))
        wrong = imported(place) if said.imported and place.is_dir() else []
        for line in wrong:
            print(f"{'imported':<12}{line}")
    count = len(findings) + len(wrong)
    print(
        f"{count} findings in {len(known['names'])} names and {len(known['flags'])} flags of {known['sglang']}"
    )
    return 1 if findings or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
