"""Requests that nobody should send, made from the server's own OpenAPI description, against a plain server and ours.

    python scripts/fuzz_routes.py --tiny --examples 40 --json results/fuzz-routes.json --markdown results/fuzz-routes.md

Schemathesis (the dependency group `fuzz`) makes them. Both servers have an admin key that SGLang's own routes are asked
without, so nothing that steers, ends or loads a server is reached. What fails on the plain server is SGLang's own; ours
may fail nowhere else, on WHIFLASH's routes, which are asked with the key, not at all, and must answer a known prompt
afterwards as before.
"""

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import outcome
from servers_beside import Renewed, arguments_of

from whiflash_sglang.serving import Server, ServerHost

KEY = "boss"
OURS = "/whiflash/"
NONE = "no answer"
"""In the place of a status: none within the time, or a connection that broke."""
DEAD = "server ended"
"""The same, with the whole server."""
SECONDS = 120
"""For an answer. What takes longer is counted as `NONE`."""
MEANT = {("GET /whiflash/state", "504")}
"""What is documented: the request's own `timeout` was over."""
PHASES = {False: "fuzzing", True: "coverage,fuzzing"}
"""Of Schemathesis, by whether the routes are ours: every edge of a long schema would take hours."""


@dataclass(frozen=True)
class Interaction:
    """where: method and path. answer: None where there was none. at: seconds of the wall clock."""

    where: str
    request: dict[str, Any]
    answer: dict[str, Any] | None
    at: float


@dataclass
class Fuzzed:
    """How often a method and path gave a status. first: of those that failed, what was asked first."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str], Interaction] = field(default_factory=dict)

    def add(self, asked: list[Interaction], *, dead: bool = False) -> None:
        for one in asked:
            status = str(one.answer["status_code"]) if one.answer else DEAD if dead else NONE
            self.counts[one.where, status] += 1
            if failed(status):
                self.first.setdefault((one.where, status), one)

    def failures(self) -> dict[tuple[str, str], int]:
        return {key: count for key, count in self.counts.items() if failed(key[1])}

    def sums(self) -> dict[str, int]:
        """Requests by what became of them."""
        kinds = Counter[str]()
        for (_, status), count in self.counts.items():
            kinds[f"{status[0]}xx" if status.isdigit() else status] += count
        return dict(kinds)


def failed(status: str) -> bool:
    return not status.isdigit() or int(status) >= 500


def answer(server: Server) -> list[int]:
    """Tokens of a known prompt's greedy answer."""
    body = {
        "input_ids": [1, 2, 3, 4],
        "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True},
    }
    asked = httpx.post(f"{server.base_url}/generate", json=body, timeout=SECONDS).raise_for_status()
    tokens: list[int] = asked.json()["output_ids"]
    return tokens


def paths(server: Server, ours: bool) -> list[str]:
    """WHIFLASH's in the server's description, or SGLang's that open without the admin key."""
    described: dict[str, Any] = httpx.get(f"{server.base_url}/openapi.json", timeout=SECONDS).json()["paths"]
    if ours:
        return [path for path in described if path.startswith(OURS)]
    with httpx.Client(base_url=server.base_url, timeout=SECONDS) as client:
        return [
            path
            for path, methods in described.items()
            if not path.startswith(OURS)
            and any(client.request(method.upper(), path).status_code != 401 for method in methods)
        ]


def fuzz(renewed: Renewed, said: argparse.Namespace, folder: Path, *, ours: bool = False) -> Fuzzed:
    """One request at a time and seeded, a path after the other. A path that ends the server is left there."""
    found, left = Fuzzed(), paths(renewed.server, ours)
    while left:
        record = schemathesis(renewed.server, left, said, folder, ours=ours)
        if renewed.lives:
            found.add(record)
            break
        # The first one without an answer that is followed by none with one.
        place = max((i + 1 for i, one in enumerate(record) if one.answer), default=0)
        found.add(record[:place])
        if place == len(record):
            raise RuntimeError("the server ended when nobody asked it")
        found.add(record[place : place + 1], dead=True)
        seen = {one.where.split(" ", 1)[1] for one in record[: place + 1]}
        left = [path for path in left if path not in seen]
    return found


def schemathesis(
    server: Server, chosen: list[str], said: argparse.Namespace, folder: Path, *, ours: bool
) -> list[Interaction]:
    record = folder / "record.ndjson"
    record.unlink(missing_ok=True)
    command = [str(said.schemathesis), "run", f"{server.base_url}/openapi.json", "--phases", PHASES[ours]]
    command += [argument for path in chosen for argument in ("--include-path", path)]
    command += ["--checks", "not_a_server_error", "--continue-on-failure", "--no-shrink", "--no-color"]
    command += ["--workers", "1", "--seed", str(said.seed), "--max-examples", str(said.examples)]
    command += ["--request-timeout", str(SECONDS), "--report", "ndjson", "--report-ndjson-path", str(record)]
    command += ["--header", f"Authorization: Bearer {KEY}"] if ours else []
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, stdin=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 1):  # 1: it found something
        raise RuntimeError(f"Schemathesis ended with {done.returncode}")
    return interactions(record.read_text("utf-8").splitlines())


def ask_again(renewed: Renewed, found: Fuzzed, known: Fuzzed) -> None:
    """What failed and is not known yet is asked there once, and added to what is known: the same examples are not
    drawn in every run.
    """
    for key, one in found.first.items():
        if key in known.first:
            continue
        asked = one.request
        path = httpx.URL(asked["uri"]).raw_path.decode()
        headers = {name: values[0] for name, values in asked["headers"].items()}
        content = base64.b64decode((asked.get("body") or {}).get("$base64", ""))
        try:
            done = httpx.request(
                asked["method"],
                renewed.server.base_url + path,
                headers=headers,
                content=content,
                timeout=SECONDS,
            )
            answered = {"status_code": done.status_code, "body": {"$base64": base64.b64encode(done.content)}}
        except httpx.HTTPError:
            answered = None
        time.sleep(2)  # what ends a server ends a child of it first
        known.add([replace(one, answer=answered)], dead=not renewed.lives)


def interactions(lines: list[str]) -> list[Interaction]:
    """Every request that Schemathesis recorded, in their order."""
    recorders = (json.loads(line).get("ScenarioFinished", {}).get("recorder", {}) for line in lines)
    found = (
        Interaction(recorder["label"], one["request"], one.get("response"), one["timestamp"])
        for recorder in recorders
        for one in recorder.get("interactions", {}).values()
    )
    return sorted(found, key=lambda one: one.at)


def body(message: Mapping[str, Any] | None) -> str:
    """As short text; empty where there is none."""
    content = (message or {}).get("content") or (message or {}).get("body") or {}
    return base64.b64decode(content.get("$base64", "")).decode("utf-8", "replace")[:160]


def table(runs_: Mapping[str, Fuzzed]) -> str:
    kinds = ("2xx", "3xx", "4xx", "5xx", NONE, DEAD)
    lines = ["| server | requests | " + " | ".join(kinds) + " |", "| --- |" + " ---: |" * (len(kinds) + 1)]
    for name, fuzzed in runs_.items():
        sums = fuzzed.sums()
        counts = (fuzzed.counts.total(), *(sums.get(kind, 0) for kind in kinds))
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


SHOWN = 90
"""Characters of an answer and its request."""


def failures(plain: Fuzzed, drafting: Fuzzed) -> str:
    """By method, path and status, with one of the answers and what had been asked."""
    lines = [
        "| route | status | plain | WHIFLASH | an answer, and to what |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for key in sorted({**plain.failures(), **drafting.failures()}):
        one = plain.first.get(key) or drafting.first[key]
        said = f"{body(one.answer)} to {body(one.request)}".replace("|", "\\|").replace("`", "'")
        shown = " ".join("".join(c if c.isprintable() else " " for c in said).split())
        cut = shown if len(shown) <= SHOWN else shown[:SHOWN].rstrip("\\") + "…"
        lines.append(f"| `{key[0]}` | {key[1]} | {plain.counts[key]} | {drafting.counts[key]} | `{cut}` |")
    return "\n".join(lines) if len(lines) > 2 else "None."


def complaints(plain: Fuzzed, drafting: Fuzzed, own: Fuzzed) -> list[str]:
    """What fails with WHIFLASH and not without."""
    more = sorted(drafting.failures().keys() - plain.failures().keys())
    return [
        *(f"{where} gives {status} with WHIFLASH alone" for where, status in more),
        *(f"{where} gives {status}" for where, status in sorted(own.failures().keys() - MEANT)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model of random weights")
    parser.add_argument(
        "--examples", type=int, default=100, help="requests at most of a method, path and kind"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--schemathesis", type=Path, help="its command `st`; none: beside this Python, or the PATH's"
    )
    parser.add_argument("--json", type=Path, help="also write the counts there")
    parser.add_argument("--markdown", type=Path, help="also write the tables there")
    said = parser.parse_args()
    said.schemathesis = (
        said.schemathesis or shutil.which("st", path=Path(sys.executable).parent) or shutil.which("st")
    )
    if said.schemathesis is None:
        parser.error("Schemathesis is not installed: uv sync --frozen --all-packages --group fuzz")
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        host = stack.enter_context(ServerHost({"OMP_NUM_THREADS": "1"}, cwd=root))
        model, shared, ours = arguments_of(said.tiny, root)
        shared = ["--model-path", model, *shared, "--admin-api-key", KEY]
        with Renewed(shared, host) as renewed:
            before = answer(renewed.server)
            plain = fuzz(renewed, said, root)
        with Renewed([*shared, *ours], host) as renewed:
            drafting = fuzz(renewed, said, root)
            own = fuzz(renewed, said, root, ours=True)
            as_before = answer(renewed.server) == before
        with Renewed(shared, host) as renewed:
            ask_again(renewed, drafting, plain)
    counted = {"plain": plain, "WHIFLASH": drafting, "its own routes": own}
    wrong = complaints(plain, drafting, own)
    wrong += [] if as_before else ["a known prompt has another answer than before"]
    sums = (
        "; ".join(wrong)
        or "Nothing failed that a plain server answers; a known prompt's answer is as before."
    )
    print(f"{table(counted)}\n\n{failures(plain, drafting)}\n\n{sums}")
    if said.markdown:
        paragraphs = (sums, table(counted), "## What fails", failures(plain, drafting))
        outcome.write(said.markdown, "Requests that nobody should send", *paragraphs)
    if said.json:
        told = {
            name: {" ".join(key): count for key, count in sorted(f.counts.items())}
            for name, f in counted.items()
        }
        said.json.write_text(json.dumps(told, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
