"""Moved names of a release of SGLang, of those that we import, call or replace: `python scripts/upstream.py 0.5.24`.

Takes a wheel, an unpacked tree, or a version, which is fetched, and compares it with the release in `upstream.json`.
Releases are read, not imported (`sglang_sources.py`), so names take seconds. `--record` writes the installed release to
the file; our tables, which import SGLang, have the names. CONTRIBUTING.md has a step for each kind of finding.
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
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sglang_sources import Function, Tree, Walker

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")
FLAGS = ROOT / "lab" / "whiflash_lab" / "recipes" / "flags.json"


def our_names() -> list[str]:
    """Return the names of SGLang's that we import, call or replace. Imports torch, and SGLang if it is installed."""
    from whiflash_cpu import seam_tables as seams
    from whiflash_sglang.engine import patches
    from whiflash_sglang.engine.names import PRIVATE_NAMES

    modules = set(Tree(installed()).modules())
    names = [name for name in patches.imported() if name.replace(":", ".") not in modules]
    names += [*PRIVATE_NAMES, *(path.removesuffix(".__new__") for path, *_ in patches.replaced())]
    names += [seam.path for seam in (*seams.EARLY_SEAMS, *seams.SEAMS)]
    return sorted(set(names))


class Release(NamedTuple):
    """A release of SGLang. names: each of our names as `Walker.describe` shows it there. flags: server arguments."""

    version: str
    names: Mapping[str, Mapping[str, Any] | None]
    flags: list[str]


def read(tree: Tree, names: list[str]) -> Release:
    walker, version = Walker(tree), metadata.version("sglang")
    return Release(version, {path: walker.describe(path) for path in names}, walker.flags())


def recorded() -> Release:
    return Release(**json.loads(RECORD.read_bytes()))


def record() -> str:
    """Return the text of `upstream.json` for the installed release, one line per name."""
    version, names, flags = read(Tree(installed()), our_names())
    lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(said)}" for path, said in names.items())
    return f'{{"version": "{version}", "flags": {json.dumps(flags)}, "names": {{\n{lines}\n}}}}\n'


def server_flags() -> str:
    """The text of the table of flags for `whiflash check --recipe`, a line for each. Imports SGLang."""
    from sglang.srt.server_args import ServerArgs

    def plain(value: object) -> object:
        return value if isinstance(value, str | int | float | list | dict) else None

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    arguments, lines = ServerArgs(model_path=""), []
    for action in parser._actions:
        flag: dict[str, Any] = {"names": action.option_strings, "dest": action.dest}
        if isinstance(action, argparse.BooleanOptionalAction):
            flag = {**flag, "names": action.option_strings[:1], "negated": True}
        elif action.nargs == 0:
            flag["const"] = getattr(action, "const_value", action.const)
        else:
            flag["type"] = getattr(action.type, "__name__", "str")
            flag |= {} if action.nargs is None else {"nargs": action.nargs}
            flag |= {} if action.choices is None else {"choices": sorted(action.choices, key=str)}
        lines.append(json.dumps(flag))
    defaults = json.dumps({name: plain(getattr(arguments, name)) for name in arguments.__struct_fields__})
    joined = ",\n  ".join(lines)
    return f'{{"version": "{metadata.version("sglang")}", "defaults": {defaults}, "flags": [\n  {joined}\n]}}\n'


class Finding(NamedTuple):
    """A difference. kind: `missing`, `parameters`, `changed`, `unclear` or `flags`."""

    kind: str
    name: str
    detail: str


def compare(tree: Tree, known: Release) -> list[Finding]:
    """Return the differences of `tree` from the release `known`."""
    walker = Walker(tree)
    findings = [
        finding
        for path, before in known.names.items()
        if before is not None
        for finding in _judge(walker, path, before)
    ]
    added, gone = differing(known.flags, walker.flags())
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
    """Return the added names and the removed ones."""
    return [one for one in now if one not in before], [one for one in before if one not in now]


def difference(path: str, old: Tree, new: Tree) -> str:
    """Return the unified diff of a function between two trees."""
    texts = []
    for tree in (old, new):
        walker = Walker(tree)
        found = walker.find(path)
        texts.append(walker.text(found).split("\n") if found and isinstance(found.node, Function) else [])
    return "\n".join(difflib.unified_diff(*texts, "before", "now", lineterm=""))


def installed() -> Path:
    """Return the directory that contains the installed `sglang`, without importing it."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.submodule_search_locations is None:
        raise ValueError("no SGLang is installed")
    return Path(next(iter(found.submodule_search_locations))).parent


@contextmanager
def sources(said: str) -> Iterator[Path]:
    """Yield the path of a wheel or directory; a version is fetched into a directory that is removed afterwards."""
    if Path(said).exists():
        yield Path(said)
        return
    uv = shutil.which("uv") or ROOT / ".uv" / "bin" / "uv"
    with tempfile.TemporaryDirectory() as folder:
        command = [str(uv), "pip", "install", "--quiet", "--no-deps", "--target", folder, f"sglang=={said}"]
        subprocess.run(command, check=True)
        yield Path(folder)


def imported(place: Path) -> list[str]:
    """Return the findings of our own checks of names and seams on these sources, with all else as installed."""
    code = (
        "import json; from whiflash_sglang.engine import patches, patching\n"
        "from whiflash_cpu.seams import verify_seams\n"
        "found = [*patches.missing(), *patching.verify_names()[1:], *verify_seams()]\n"
        "print(json.dumps([f'{one.name}: {one.detail}' for one in found if not one.ok]))"
    )
    paths = [str(place), *(str(ROOT / part) for part in ("", "cpu", "kernels", "lab", "sdk", "train"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return [done.stderr.strip().split("\n")[-1]]
    return list(json.loads(done.stdout.strip().split("\n")[-1]))


SUITES = {
    "short": (
        "tests/compat",
        "lab/tests/test_recipes.py",
        *(f"tests/worker/test_{name}.py" for name in ("plain_text", "hicache", "adapters")),
    ),
    "whole": ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"),
}
"""Arguments of pytest. Short: names, refusals, texts in all modes, the prefix cache, its host copy, LoRA."""


def tested(place: Path, suite: str) -> bool:
    """Whether a suite of tests passes with these sources in place of the installed SGLang, as if supported."""
    environment = {**os.environ, "PYTHONPATH": str(place), "WHIFLASH_CANARY": "1"}
    command = [sys.executable, "-m", "pytest", "-q", *SUITES[suite]]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("release", nargs="?", help="a wheel, a directory that holds sglang/, or a version")
    parser.add_argument(
        "--record", action="store_true", help="write upstream.json and flags.json for the installed one"
    )
    parser.add_argument("--diff", action="store_true", help="show how functions differ")
    parser.add_argument("--import", action="store_true", dest="imported", help="import and check the sources")
    parser.add_argument("--test", choices=SUITES, help="run a suite with the new sources, which decides")
    said = parser.parse_args()
    if said.record == bool(said.release):
        parser.error("give a release, or --record")
    if said.record:
        RECORD.write_text(record(), encoding="utf-8")
        FLAGS.write_text(server_flags(), encoding="utf-8")
        return 0
    known = recorded()
    with sources(said.release) as now:
        new = Tree(now)
        findings = compare(new, known)
        for finding in findings:
            print(f"{finding.kind:<12}{finding.name}: {finding.detail}")
            if said.diff and finding.kind in ("changed", "parameters"):
                print(textwrap.indent(difference(finding.name, Tree(installed()), new), "    "))
        print(f"{len(findings)} findings in {len(known.names)} names and the server's arguments", flush=True)
        wrong = imported(now) if said.imported and now.is_dir() else []
        for line in wrong:
            print(f"{'imported':<12}{line}")
        passed = not said.test or tested(now, said.test)
    return 0 if passed and (said.test or not (findings or wrong)) else 1


if __name__ == "__main__":
    sys.exit(main())
