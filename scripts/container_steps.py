"""Executes the steps of a Containerfile one by one without a container engine: in directories, through chroot, as root.

    debootstrap --variant=minbase bookworm base
    python scripts/container_steps.py deploy/container/Containerfile --target cpu --base base --work stages

`base` replaces the image that the first FROM names. Every stage that the target needs gets a directory in `stages`
with what the stage before it has; RUN is executed there with the environment, shell and directory that the file says,
COPY copies from the repository or from another stage. Each step is printed with how long it took. The last line is the
target's entry point; `--run` executes it, or another command, in the target's directory as the image's user.

What is left out of an engine's work: layers, caches, .dockerignore, and walls between processes. What is copied from
another stage shares its files with it.

If a proxy signs with its own certificate, put that into `base/usr/local/share/ca-certificates/` and add
`--set PIP_CERT=/etc/ssl/certs/ca-certificates.crt --set SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt`.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Stage:
    """name, parent: of FROM. steps: instruction and its text, in order."""

    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def needs(self) -> Iterator[str]:
        """The stages, or images, that this one is made of or copies from."""
        yield self.parent
        for instruction, text in self.steps:
            if instruction == "COPY" and (found := re.match(r"--from=(\S+)", text)):
                yield found[1]


def read(text: str) -> dict[str, Stage]:
    """The stages of a Containerfile by name, in their order. Raises ValueError for an instruction before the first."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    stages: dict[str, Stage] = {}
    for line in filter(str.strip, joined.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            name = name.strip() or f"stage {len(stages)}"
            stages[name] = Stage(name, parent.strip())
        elif not stages:
            raise ValueError(f"{instruction} precedes the first FROM")
        else:
            list(stages.values())[-1].steps.append((instruction, rest.strip()))
    return stages


def order(stages: dict[str, Stage], target: str) -> list[Stage]:
    """The stages that `target` needs, each behind those that it needs. Raises ValueError for an unknown target."""
    if target not in stages:
        raise ValueError(f"no stage {target}; there are {', '.join(stages)}")
    needed: list[Stage] = []

    def visit(name: str) -> None:
        if name in stages and stages[name] not in needed:
            for other in stages[name].needs():
                visit(other)
            needed.append(stages[name])

    visit(target)
    return needed


@dataclass
class Settings:
    """What a stage hands on to those that are built on it."""

    environment: dict[str, str]
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    directory: str = "/"
    user: str = "0"
    entry: list[str] = field(default_factory=list)

    def copy(self) -> "Settings":
        return Settings(dict(self.environment), list(self.shell), self.directory, self.user, list(self.entry))

    def command(self, root: Path, words: list[str], beside: dict[str, str] | None = None) -> list[str]:
        """`words` in `root`, with this environment, `beside`, and no other."""
        given = [f"{name}={value}" for name, value in (self.environment | (beside or {})).items()]
        inside = 'cd "$0" && exec "$@"'
        user = f"--userspec={self.user}:{self.user}"
        return [
            "chroot",
            user,
            str(root),
            "/usr/bin/env",
            "-i",
            *given,
            "/bin/sh",
            "-c",
            inside,
            self.directory,
            *words,
        ]


class Builder:
    """Executes stages below `work`; `base` replaces every image that is no stage.

    given: what a RUN finds in its environment beside what the file says.
    """

    def __init__(self, base: Path, work: Path, given: dict[str, str]) -> None:
        self.base, self.work, self.given = base, work, given
        self.settings: dict[str, Settings] = {}

    def build(self, stage: Stage) -> None:
        root = self.work / stage.name
        parent = self.settings.get(stage.parent)
        self._duplicate(self.base if parent is None else self.work / stage.parent, root)
        now = parent.copy() if parent else Settings({"PATH": PATH})
        self.settings[stage.name] = now
        for instruction, text in stage.steps:
            print(f"[{stage.name}] {instruction} {text}", flush=True)
            begun = time.monotonic()
            self.step(root, now, instruction, text)
            if instruction in ("RUN", "COPY"):
                print(f"    {time.monotonic() - begun:.1f} s", flush=True)

    def step(self, root: Path, now: Settings, instruction: str, text: str) -> None:
        """Raises CalledProcessError where a RUN fails, ValueError for an instruction that is not known here."""
        if instruction == "RUN":
            with mounted(root):
                subprocess.run(now.command(root, [*now.shell, text], self.given), check=True)
        elif instruction == "COPY":
            self._copy(root, now, shlex.split(text))
        elif instruction == "ENV":
            now.environment |= dict(pair.split("=", 1) for pair in shlex.split(text))
        elif instruction == "WORKDIR":
            now.directory = text
            inside(root, text).mkdir(parents=True, exist_ok=True)
        elif instruction == "SHELL":
            now.shell = json.loads(text)
        elif instruction == "USER":
            now.user = text
        elif instruction == "ENTRYPOINT":
            now.entry = json.loads(text)
        elif instruction not in ("EXPOSE", "HEALTHCHECK", "LABEL"):
            raise ValueError(f"{instruction} is not known here")

    def _copy(self, root: Path, now: Settings, words: list[str]) -> None:
        source, of_stage = ROOT, words[0].startswith("--from=")
        if of_stage:
            source = self.work / words.pop(0).removeprefix("--from=")
        *names, to = words
        target = inside(root, str(Path(now.directory, to)))
        for name in names:
            found = inside(source, name)
            if found.is_dir():
                self._duplicate(found, target, how="--link" if of_stage else "--reflink=auto")
            else:
                into = target / found.name if to.endswith("/") else target
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, into)

    @staticmethod
    def _duplicate(source: Path, target: Path, how: str = "--reflink=auto") -> None:
        """Copy a directory's contents into another one. how: `--link` if the source is complete, so gigabytes once."""
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", how, f"{source}/.", str(target)], check=True)


def inside(root: Path, path: str) -> Path:
    """`path` of a stage on this machine. Raises ValueError where it leads out."""
    found = root / path.lstrip("/")
    if not found.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} leads out of {root}")
    return found


@contextmanager
def mounted(root: Path) -> Iterator[None]:
    """/proc, /sys, /dev and the resolver of this machine in `root`, for as long as the block lasts."""
    (root / "etc").mkdir(exist_ok=True)
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    with ExitStack() as stack:
        for name in ("proc", "sys", "dev"):
            (root / name).mkdir(exist_ok=True)
            subprocess.run(["mount", "--rbind", f"/{name}", str(root / name)], check=True)
            subprocess.run(["mount", "--make-rslave", str(root / name)], check=True)
            unmount = ["umount", "--recursive", "--lazy", str(root / name)]
            stack.callback(subprocess.run, unmount, check=True)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--target", required=True, help="the stage to build")
    parser.add_argument(
        "--base", type=Path, required=True, help="a root file system in the place of the images"
    )
    parser.add_argument("--work", type=Path, required=True, help="where stages are made")
    parser.add_argument(
        "--set", action="append", default=[], help="NAME=VALUE for every RUN: a proxy, an index"
    )
    parser.add_argument(
        "--run", nargs=argparse.REMAINDER, help="a command in the result; none: its entry point"
    )
    said = parser.parse_args()
    builder = Builder(said.base, said.work, dict(pair.split("=", 1) for pair in said.set))
    for stage in order(read(said.file.read_text("utf-8")), said.target):
        builder.build(stage)
    made = builder.settings[said.target]
    root = said.work / said.target
    print(shlex.join(made.command(root, made.entry)))
    if said.run is not None:
        with mounted(root):
            return subprocess.run(made.command(root, said.run or made.entry)).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
