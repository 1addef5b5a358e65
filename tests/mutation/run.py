"""Mutation testing: plants single faults and asks the tests whether they notice.

    python tests/mutation/run.py --most 20 --out results.jsonl            # every target, 20 faults a module
    python tests/mutation/run.py --only 'prices/costs' --most 1000       # one module, every fault
    python tests/mutation/run.py --out results.jsonl --report             # the table of what was found
    python tests/mutation/run.py --only triton_kernels --out kernels.jsonl # faults planted by hand (planted.toml)

A process that has imported everything but our own packages forks for every mutant, so that importing SGLang is paid
once. The child finds the mutated module in a copy of the tree that comes first on its path; processes that it starts
find it too. Results are kept as they come: the same command goes on where it was ended.
"""

import argparse
import contextlib
import fnmatch
import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from outcomes import KILLED, SURVIVED, TIMEOUT, Result, read, report
from planted import Mutant, planted

HERE = Path(__file__).parent
SOURCES = ("whiflash_sglang", *(f"{part}/whiflash_{part}" for part in ("cpu", "kernels", "lab", "sdk", "train")))


@dataclass(frozen=True, slots=True)
class Target:
    """Modules and the tests that judge them, as in targets.toml.

    select: of the tests, those that pytest's `-k` selects by it. planted: the faults are those of planted.toml.
    environment: of the process in which the tests run.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    warm: tuple[str, ...]
    select: str = ""
    planted: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def targets() -> list[Target]:
    """Targets of targets.toml."""
    table = tomllib.loads((HERE / "targets.toml").read_text("utf-8"))
    sources = [
        Target(tuple(t["modules"]), tuple(t["tests"]), tuple(table["warm"].get(str(t["warm"]), t["warm"])))
        for t in table["target"]
    ]
    kernels = [
        Target(
            (f"kernels/whiflash_kernels/triton_kernels/{module}.py",),
            tuple(f"kernels/tests/test_{name}.py" for name in tests),
            ("torch", "triton", "hypothesis", "numpy"),
            "triton",
            True,
            {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )
        for module, tests in table["planted"].items()
    ]
    return sources + kernels


def _of_one_process() -> list[list[int]]:
    """Numbers of the targets that import the same: they share a process, because importing SGLang takes so long."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, target in enumerate(targets()):
        groups[target.warm, tuple(target.environment.items())].append(number)
    return list(groups.values())


# ---------------------------------------------------------------- a target in a warm process that forks


def run_target(root: Path, target: Target, options: argparse.Namespace) -> bool:
    """Import what is slow, then fork for every mutant; results go to `options.out`. False: the tests fail anyway."""
    known = {(r.module, r.name, r.digest) for r in read(options.out)}
    planned = []
    for module in _modules(root, target, options.only):
        for mutant in _mutants(target, module, (root / module).read_text(), options.most):
            digest = _digest(mutant.source)
            if (module, mutant.name, digest) not in known:
                planned.append((mutant, digest))
    if not planned:
        return True
    for name in ("pytest", *target.warm):
        importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    tests = [*target.tests, "-k", target.select]
    unharmed = _finish(_start(root, None, tests), limit=float("inf"))
    if unharmed.outcome != SURVIVED:
        print(f"the tests of {target.modules} fail without a fault:\n{unharmed.log}", file=sys.stderr)
        return False
    limit = max(60.0, 5 * unharmed.seconds)
    running: list[tuple[Trial, Any]] = []
    with options.out.open("a") as out:
        while planned or running:
            while planned and len(running) < options.jobs:
                mutant, digest = planned.pop(0)
                running.append((_start(root, mutant, tests), (mutant, digest)))
            trial, (mutant, digest) = running.pop(0)
            end = _finish(trial, limit, patience=0.2)
            if end is None:
                running.append((trial, (mutant, digest)))
                continue
            result = Result(
                mutant.module, mutant.name, mutant.line, end.outcome, round(end.seconds, 1), digest, mutant.part
            )
            print(json.dumps(asdict(result)), file=out, flush=True)
            print(f"{end.outcome:9} {end.seconds:6.1f} s  {mutant.module}:{mutant.line}  {mutant.name}", flush=True)
    return True


def _mutants(target: Target, module: str, source: str, most: int) -> Sequence[Mutant]:
    if target.planted:
        return planted(module, source)
    from mutants import sample  # needs cosmic-ray

    return sample(module, source, most)


def _modules(root: Path, target: Target, only: Sequence[str]) -> Iterator[str]:
    for pattern in target.modules:
        for path in sorted(root.glob(pattern)):
            name = str(path.relative_to(root))
            if path.stat().st_size and (not only or any(fnmatch.fnmatch(name, f"*{part}*") for part in only)):
                yield name


@dataclass(frozen=True, slots=True)
class Trial:
    """A child that runs the tests in a tree of its own."""

    pid: int
    overlay: Path
    began: float


@dataclass(frozen=True, slots=True)
class End:
    """How it ended."""

    outcome: str
    seconds: float
    log: str


def _start(root: Path, mutant: Any, tests: Sequence[str]) -> Trial:
    """Fork a child that runs the tests with the fault in place."""
    overlay = Path(tempfile.mkdtemp(prefix="mutant-"))
    for name in SOURCES:
        _link(root / name, overlay / name)
    if mutant is not None:
        place = overlay / mutant.module
        place.unlink()
        place.write_text(mutant.source)
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        _child(root, overlay, tests)
    return Trial(pid, overlay, began)


def _link(source: Path, copy: Path) -> None:
    """The package's folders anew, its files as hard links: a symbolic one would lead out of a bundle."""
    shutil.copytree(source, copy, copy_function=_file, ignore=shutil.ignore_patterns("__pycache__"))


def _file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _child(root: Path, overlay: Path, tests: Sequence[str]) -> None:
    """Never returns: its exit code is pytest's."""
    code = 3
    try:
        os.setsid()
        os.chdir(root)
        with (overlay / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        paths = [str(overlay / Path(name).parent) for name in SOURCES]
        # The tree's own behind them: a conftest that misses it would put it in front.
        sys.path[:0] = [*paths, *(str(root / Path(name).parent) for name in SOURCES)]
        # SGLang imports its platform, so a little of us is there.
        homes = {Path(name).name: overlay / Path(name).parent for name in SOURCES}
        for name, module in list(sys.modules.items()):
            if name.startswith("whiflash") and hasattr(module, "__path__"):
                module.__path__ = [str(homes[name.partition(".")[0]].joinpath(*name.split(".")))]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(overlay / "hypothesis")
        sys.dont_write_bytecode = True
        import hypothesis
        import pytest

        # One failing example is enough; shrinking it takes most of the time.
        found = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutation", phases=found, deadline=None)
        hypothesis.settings.load_profile("mutation")
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
    finally:
        os._exit(code)


def _finish(trial: Trial, limit: float, patience: float = float("inf")) -> End | None:
    """Wait for a child's end, at most `patience` seconds; one that ran for `limit` seconds is ended."""
    asked = time.monotonic()
    while True:
        done, status = os.waitpid(trial.pid, os.WNOHANG)
        seconds = time.monotonic() - trial.began
        if done or seconds > limit:
            break
        if time.monotonic() - asked > patience:
            return None
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(trial.pid, signal.SIGKILL)  # what the tests started too
    log = (trial.overlay / "log").read_text(errors="replace")[-3000:]
    if done:
        outcome = SURVIVED if os.waitstatus_to_exitcode(status) == 0 else KILLED
    else:
        os.waitpid(trial.pid, 0)
        outcome = TIMEOUT
    shutil.rmtree(trial.overlay, ignore_errors=True)
    return End(outcome, seconds, log)


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help="tree to plant faults into")
    parser.add_argument("--only", nargs="*", help="modules whose path contains one of these (globs)")
    parser.add_argument("--most", type=int, default=20, help="faults a module, drawn by its name")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl"), help="results, one a line")
    parser.add_argument("--report", action="store_true", help="print the table of --out, run nothing")
    parser.add_argument("--targets", type=int, nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.absolute()
    if options.targets is not None:
        sys.path.insert(0, str(HERE))
        every = targets()
        os.environ.update(every[options.targets[0]].environment)
        done = [run_target(options.root.absolute(), every[index], options) for index in options.targets]
        raise SystemExit(not all(done))
    if not options.report:
        for group in _of_one_process():
            again = [sys.executable, str(HERE / "run.py"), *sys.argv[1:], "--targets", *map(str, group)]
            if subprocess.run(again, check=False).returncode != 0:
                print(f"targets {group} were not finished", file=sys.stderr)
    print(report(read(options.out)))


if __name__ == "__main__":
    main()
