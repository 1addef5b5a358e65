"""What only a GPU can show, in parts that each end within ten minutes: `make gpu`, `make gpu-evidence`.

    python tests/gpu/run.py                        # what is left to do on this machine's GPU
    python tests/gpu/run.py --only kernels         # parts whose name begins so
    python tests/gpu/run.py --device cpu           # a rehearsal of the parts that a CPU can run

Each part is a process of its own. Its record, one JSON file, says what it printed, on which card, of which revision
and how long it took; a part whose record is of this code and this card is not run again, so a session that was cut
short goes on where it was. Needs only Python for itself: the kernels' parts run where torch and triton are installed,
the others where SGLang is too, and are recorded as left out where it is not.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "gpu"
SECONDS = 600
SOURCES = ("whiflash_sglang", "kernels/whiflash_kernels", "kernels/bench", "kernels/tests", "tests/gpu")
ARMS = "plain,eagle3,dflash,auto"


@dataclass(frozen=True)
class Part:
    """command: behind the interpreter, with `{device}` and `{out}`, a scratch file for figures, filled in.

    evidence: only for `make gpu-evidence`. rehearsal: what differs on a CPU, None where a CPU cannot run it.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    evidence: bool = False
    rehearsal: tuple[str, ...] | None = ()


def kernel_tests(name: str, *files: str) -> Part:
    paths = (f"kernels/tests/test_{file}.py" for file in files)
    needs = ("torch", "triton", "pytest", "hypothesis")
    return Part(f"kernels-{name}", ("-m", "pytest", "-q", *paths), needs)


def bench(concurrency: int) -> Part:
    whiflash = ("-c", "from whiflash_sglang.cli import main; main()", "bench")
    limits = ("--concurrency", str(concurrency), "--minutes", "7", "--repetitions", "8")
    command = (*whiflash, "--arms", ARMS, *limits, "--json", "--out", "{out}")
    return Part(f"speed-{concurrency}", command, ("torch", "triton", "sglang"), evidence=True, rehearsal=None)


_BENCH = ("kernels/bench/bench.py", "--device", "{device}", "--output", "results/gpu/kernels", "--json")
PARTS: tuple[Part, ...] = (
    kernel_tests("ops", "block", "router", "routing_stats", "copies"),
    kernel_tests("caches", "backlog", "catch_up", "attention"),
    kernel_tests("graphs", "graphs", "rounds", "dispatch"),
    kernel_tests("upstream", "upstream", "bench"),
    Part("kernels-speed", _BENCH, ("torch", "triton"), rehearsal=None),
    *(bench(concurrency) for concurrency in (1, 8, 32, 64)),
)
"""In this order: what is quick and what others rest on first."""


def digest() -> str:
    """Of the sources that the parts run."""
    found = hashlib.sha256()
    for path in sorted(p for source in SOURCES for p in (ROOT / source).rglob("*.py")):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def machine(device: str) -> str:
    """The card, or the processor, as its driver names it."""
    if device == "cpu":
        return f"rehearsal on a CPU ({platform.machine()}, {os.cpu_count()} threads)"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"no GPU answers ({error}); --device cpu rehearses what a CPU can run") from None


def missing(part: Part) -> list[str]:
    return [name for name in part.needs if find_spec(name) is None]


def run(part: Part, device: str, scratch: Path, seconds: int) -> dict[str, Any]:
    """Run a part to its end or its limit. `status`: passed, failed, timed out, or left out (with what is missing)."""
    if lacking := missing(part):
        return {"status": "left out", "why": f"needs {', '.join(lacking)}"}
    figures = scratch / f"{part.name}.figures.json"
    figures.unlink(missing_ok=True)
    filled = [word.replace("{device}", device).replace("{out}", str(figures)) for word in part.command]
    if device == "cpu":
        filled += part.rehearsal or ()
    paths = [ROOT, ROOT / "kernels", ROOT / "sdk", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if str(p))}
    began = time.monotonic()
    with (scratch / f"{part.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *filled],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = "timed out"
        log.seek(0)
        tail = log.read()[-4000:]
    return {
        "status": status,
        "command": ["python", *(word.replace(str(scratch), "SCRATCH") for word in filled)],
        "seconds": round(time.monotonic() - began, 1),
        "figures": json.loads(figures.read_text()) if figures.exists() else None,
        "tail": tail,
    }


def done(record: Path, code: str, card: str) -> bool:
    """Whether a record is of this code and card, and of a part that ended well."""
    if not record.exists():
        return False
    found = json.loads(record.read_text())
    return (found["code"], found["machine"], found["status"]) == (code, card, "passed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="parts whose name begins so")
    parser.add_argument(
        "--evidence", action="store_true", help="also what takes long: speed against other arms"
    )
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a part")
    parser.add_argument("--records", type=Path, default=RECORDS)
    chosen = parser.parse_args(arguments)
    card, code = machine(chosen.device), digest()
    records = chosen.records if chosen.device == "cuda" else chosen.records / "rehearsal"
    records.mkdir(parents=True, exist_ok=True)
    parts = [p for p in PARTS if p.name.startswith(chosen.only) and (chosen.evidence or not p.evidence)]
    if chosen.device == "cpu":
        parts = [p for p in parts if p.rehearsal is not None]
    bad = 0
    for part in parts:
        record = records / f"{part.name}.json"
        if not chosen.again and done(record, code, card):
            print(f"{part.name:24} done before")
            continue
        result = run(part, chosen.device, records, chosen.seconds)
        record.write_text(
            json.dumps({"part": part.name, "machine": card, "code": code, **result}, indent=1) + "\n"
        )
        bad += result["status"] in ("failed", "timed out")
        print(f"{part.name:24} {result['status']}  {result.get('seconds', result.get('why'))}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
