"""Walks README.md and docs/tutorial.md as a new user does, from the first line to the last, in a bare file system.

    debootstrap --variant=minbase --include=ca-certificates bookworm root
    python scripts/new_user.py --root root --markdown results/new-user.md

As root, through chroot. The packages that the README names are installed, a user is made, the revision that is checked
out here is cloned into his home, and every command and every Python block of both pages runs there as it is written,
with nothing of this machine in its environment but what `--set` says. What serves is waited for and runs until the page
ends. Commands with a placeholder (`TARGET`) are left out. The first that fails ends the walk.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import outcome
import psutil
from container_steps import PATH, ROOT, Settings, mounted

USER, HOME = "1000", "/home/reader"
HERE = f"{HOME}/whiflash"
PAGES = ("README.md", "docs/tutorial.md")
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z]{5,}\b")
Step = tuple[str, str]
"""What it is run with (`console`, `python`), and what it says."""


def steps_of(page: str) -> list[Step]:
    """The commands of a page, one by one, and its Python as one program in the place of its last block."""
    blocks = BLOCK.findall(page)
    program = "".join(body for kind, body in blocks if kind == "python")
    last = max((place for place, (kind, _) in enumerate(blocks) if kind == "python"), default=-1)
    steps: list[Step] = []
    for place, (kind, body) in enumerate(blocks):
        if kind == "console":
            lines = body.replace("\\\n", "").splitlines()
            commands = [line.partition(" # ")[0].strip() for line in lines]
            steps += [("console", line) for line in commands if not PLACEHOLDER.search(line)]
        elif place == last:
            steps.append(("python", program))
    return steps


class Walk:
    """A user in a root file system. rows: what was done, and how many seconds it took."""

    def __init__(self, root: Path, given: dict[str, str]) -> None:
        self.root, self.given = root, given
        self.rows: list[tuple[str, float]] = []
        self.memory: list[str] = []
        self._active = ""

    def command(self, line: str, user: str = USER) -> list[str]:
        environment = {"PATH": PATH, "HOME": HOME, "LANG": "C.UTF-8", "TERM": "xterm", **self.given}
        there = Settings(environment, directory=HERE if user == USER else "/", user=user)
        return there.command(self.root, ["/bin/bash", "-c", f"{self._active}{line}"])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        print(f"$ {name}", flush=True)
        begun = time.monotonic()
        yield
        self.rows.append((name, time.monotonic() - begun))

    def run(self, line: str, user: str = USER) -> None:
        """Raises CalledProcessError."""
        with self.timed(line):
            subprocess.run(self.command(line, user), check=True, stdin=subprocess.DEVNULL)

    def page(self, name: str) -> None:
        """Raises CalledProcessError where a step fails."""
        serving: list[subprocess.Popen[bytes]] = []
        try:
            for kind, said in steps_of((ROOT / name).read_text("utf-8")):
                if kind == "python":
                    program = f"{HOME}/page.py"
                    (self.root / program.lstrip("/")).write_text(said)
                    self.run(f"python {program}")
                elif said.startswith("source "):
                    self._active = f"{said} && "
                elif said.startswith("whiflash serve"):
                    serving.append(self._serve(said))
                else:
                    if said.startswith("pip install"):  # the page says: into an environment of your own
                        self.run("python3 -m venv ~/own")
                        self._active = "source ~/own/bin/activate && "
                    self.run(said)
        finally:
            for server in serving:
                _end(server)
            self._active = ""

    def _serve(self, line: str) -> subprocess.Popen[bytes]:
        """Until its `/health` answers, as the tutorial says. Raises CalledProcessError where it ends instead."""
        port = shlex.split(line)[-1]
        with self.timed(line):
            server = subprocess.Popen(self.command(line), start_new_session=True, stdin=subprocess.DEVNULL)
            while server.poll() is None:
                with suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=None).is_success:
                        break
                time.sleep(0.5)
            else:
                raise subprocess.CalledProcessError(server.returncode, line)
        self.memory.append(_memory(server.pid))
        return server

    def size(self, path: str) -> str:
        done = subprocess.run(["du", "-sh", self.root / path.lstrip("/")], stdout=subprocess.PIPE, text=True)
        return done.stdout.split()[0]


def _memory(pid: int) -> str:
    """GB of a server's processes: what each holds, and in brackets its share of what several hold."""
    sizes = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            held = process.memory_full_info()
            sizes.append((held.rss / 1e9, held.pss / 1e9))
    each = ", ".join(f"{rss:.2f} ({pss:.2f})" for rss, pss in sizes if rss > 0.1)
    return f"{each}; together {sum(rss for rss, _ in sizes):.1f} ({sum(pss for _, pss in sizes):.1f})"


def _end(server: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(server.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    server.wait()
    for survivor in psutil.wait_procs(family, timeout=60)[1]:
        survivor.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a bare Debian 12; it is written to")
    parser.add_argument(
        "--set", action="append", default=[], help="NAME=VALUE for every command: a proxy, an index"
    )
    parser.add_argument("--markdown", type=Path, help="also write the times and sizes there")
    said = parser.parse_args()
    root = said.root.resolve()
    walk = Walk(root, dict(pair.split("=", 1) for pair in said.set))
    bare = walk.size("/")
    with mounted(root):
        packages = re.search(r"`apt install ([^`]+)`", (ROOT / "README.md").read_text("utf-8"))
        assert packages is not None
        walk.run(f"apt-get -q update && apt-get -qy install {packages[1]} curl", user="0")
        walk.run(f"useradd --create-home --uid {USER} reader", user="0")
        subprocess.run(["git", "clone", "--quiet", ROOT, root / HERE.lstrip("/")], check=True)
        subprocess.run(["chown", "-R", f"{USER}:{USER}", root / HOME.lstrip("/")], check=True)
        for name in PAGES:
            walk.page(name)
    lines = ["| step | seconds |", "| --- | ---: |"]
    for name, seconds in walk.rows:
        lines.append("| `" + name.replace("|", "\\|") + f"` | {seconds:.1f} |")
    sizes = (
        f"On the disk: the bare system {bare}, `.venv` {walk.size(f'{HERE}/.venv')}, the environment of one's own "
        f"{walk.size(f'{HOME}/own')}, caches {walk.size(f'{HOME}/.cache')}."
    )
    memory = (
        f"GB of the servers' processes, resident (in brackets proportional): {'; then '.join(walk.memory)}."
    )
    print("\n".join((*lines, "", sizes, memory)))
    if said.markdown:
        read = (
            "All commands of README.md and docs/tutorial.md, in a bare Debian 12, by a user who is not root."
        )
        outcome.write(said.markdown, "A new user's walk", read, "\n".join(lines), sizes, memory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
