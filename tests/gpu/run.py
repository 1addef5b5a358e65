"""Checks that need a GPU, in parts that each end within ten minutes: `make gpu`.

    python tests/gpu/run.py                        # what is left to do on this machine's GPU
    python tests/gpu/run.py --only kernels,shaped  # the part `shaped`, and all whose names begin with `kernels`
    python tests/gpu/run.py --only kernels --jobs 3  # side by side on one card: for what is not timed
    python tests/gpu/run.py --keep records.tgz     # records that came back from a card, and their page
    python tests/gpu/run.py --device cpu           # a rehearsal: the parts' own code, on tiny models
    python tests/gpu/run.py --device phantom --only overlap-triton  # the same on the phantom card (`tests/phantom`)

Each part is a process of its own. Its record, one JSON file, says what it printed, on which card, of which revision,
with which versions and how long it took; a part whose record is of this code and this card is not run again, so a
session that was cut short goes on where it was. Needs only Python for itself: the kernels' parts run where torch and
triton are installed, the others where SGLang is too, and are recorded as left out where it is not. `PAGE` beside the
records says on one page how each part ended; `make docs` writes such a table. `kit.py` packs all of it for a machine
without a network: what lies in `SITE` is then imported before what is installed.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "gpu"
SITE = ROOT / "site"
PAGE = "README.md"
CACHE, WHEELS, PIECES = "cache", "cache/downloads", 3
"""WhiFlash's cache in an unpacked kit, its folder for the embedded target, and the pieces that bring it (`kit.py`)."""
LEFT_OUT = 77
"""Exit status of a part that found out by itself that it cannot run here (`checks.py`)."""
HEAVY = 8 << 20
"""Bytes of a trace that stays on the card's machine."""
FAILED = ("failed", "timed out")
PACKAGES = ("torch", "triton", "transformers", "sglang", "sglang-kernel", "flashinfer-python")
SECONDS, GRACE = 570, 20
"""Limit of a part, and how long it may take to end when it is over."""
SHORTEST = 30
"""Seconds that must be left for a part to begin."""
SOURCES = (
    *("whiflash_sglang", "cpu/whiflash_cpu", "lab/whiflash_lab", "train/whiflash_train"),
    *("kernels/whiflash_kernels", "kernels/bench", "kernels/tests", "tests"),
)


@dataclass(frozen=True)
class Part:
    """shows: what its passing shows. command: behind the interpreter, `{device}` and `{out}` to be filled in.

    out: a scratch file for figures. rehearsal: what is added on a CPU, None
    where nothing is rehearsed that another part does not. serves: takes the pair of `--model-path` and `--bundle`.
    """

    name: str
    shows: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = ()
    serves: bool = False


KERNEL_TESTS = {
    "rounds": ("sample_rows", "graphs", "block", "backlog"),
    "layers": ("layers", "drafts", "draft_passes"),
    "attention": ("attention", "catch_up", "copies"),
    "verify": ("verify",),
    "rest": (),
}
"""Files of `kernels/tests`, riskiest first; the last part runs all that no other names."""


def kernel_tests(name: str) -> Part:
    """A part of `KERNEL_TESTS`."""
    named = set(chain.from_iterable(KERNEL_TESTS.values()))
    every = [path.stem.removeprefix("test_") for path in sorted(ROOT.glob("kernels/tests/test_*.py"))]
    files = KERNEL_TESTS[name] or [file for file in every if file not in named]
    paths = (f"kernels/tests/test_{file}.py" for file in files)
    shows = f"kernels equal their references: {', '.join(files)}"
    return Part(f"kernels-{name}", shows, ("-m", "pytest", "-q", *paths), KERNELS)


def sanitizer(tool: str, name: str = "", ops: str = "") -> Part:
    shows = f"compute-sanitizer's {tool} finds nothing in one case of {ops or 'each kernel, nor at a start'}"
    command = ("tests/gpu/sanitized.py", tool, "{device}", "{out}", *([ops] if ops else []))
    rehearsal = () if tool == "memcheck" else None
    return Part(f"sanitizer-{name or tool}", shows, command, KERNELS, rehearsal=rehearsal)


def shaped(name: str, shows: str, *options: str) -> Part:
    """Rounds of an 8B-shaped random pair with pinned acceptance."""
    command = ("tests/gpu/shaped.py", "--device", "{device}", "--out", "{out}", *options)
    needs, rehearsal = (FA3, None) if "fa3" in options else (SERVER, ())
    label = "an 8B-shaped random pair with pinned acceptance"
    return Part(name, f"{label}: {shows}", command, needs, rehearsal=rehearsal)


def real(name: str, shows: str, *options: str) -> Part:
    """The user's pair as it is, or the embedded one widened to an 8B model's cost. A rehearsal widens a tiny one."""
    command = ("tests/gpu/real.py", "--device", "{device}", "--out", "{out}", *options)
    rehearsal = ("--arms", "none,plain,auto,EAGLE3") if "own" in options else ()  # DSPARK's kernels need a card
    label = f"a trained pair at an 8B model's cost: {shows}"
    return Part(name, label, command, SERVER, rehearsal=rehearsal, serves=True)


def bench(name: str, shows: str, *options: str) -> Part:
    command = ("kernels/bench/bench.py", "--device", "{device}", "--output", "{records}", "--json", *options)
    rehearsal = ("--shape", "smollm2-135m", "--budget-ms", "1") if options else None
    return Part(f"bench-{name}", shows, command, ("torch", "triton", "psutil"), rehearsal=rehearsal)


def serving(attention: str, rehearsed: bool) -> Part:
    shows = f"`serving-triton`, with {attention}"
    if attention == "triton":
        shows = "answers are plain decoding's; agents' requests; waits, memory, a trace"
    command = ("tests/gpu/serving.py", "--attention", attention, "--device", "{device}", "--out", "{out}")
    rehearsal = () if rehearsed else None
    needs = {"triton": SERVER, "fa3": FA3}.get(attention, COMPILED)
    return Part(f"serving-{attention}", shows, command, needs, rehearsal=rehearsal, serves=True)


def overlap(attention: str, rehearsed: bool) -> Part:
    shows = f"`serving-{attention}`, overlapped"
    part = serving(attention, rehearsed)
    return replace(part, name=f"overlap-{attention}", shows=shows, command=(*part.command, "--overlap"))


def family(name: str, architecture: str, kind: str, attention: str = "triton") -> Part:
    shows = f"`serving-{attention}` with {kind}"
    part = serving(attention, rehearsed=attention == "triton")
    command = (*part.command, "--family", architecture)
    return replace(part, name=f"target-{name}", shows=shows, command=command, needs=COMPILED, serves=False)


KERNELS = ("torch", "triton", "pytest", "hypothesis")
SERVER = ("torch", "triton", "transformers", "sglang", "sgl_kernel")
FA3 = (*SERVER, "sgl_kernel.flash_ops")
COMPILED = (*FA3, "sgl_kernel.moe")
"""SGLang with its own operators. The kit has stand-ins for most, without this module."""
_SINKS = "sliding windows in a pool of their own and attention sinks (gpt-oss)"
PARTS: tuple[Part, ...] = (
    Part(
        "fa3",
        "FA3 loads, equals torch on ragged rows, and what a layer takes at widths of 1 to 16",
        ("tests/gpu/fa3.py", "{out}"),
        ("torch", "triton", "sgl_kernel.flash_ops"),
        rehearsal=None,
    ),
    kernel_tests("rounds"),
    overlap("triton", rehearsed=True),
    kernel_tests("layers"),
    kernel_tests("attention"),
    kernel_tests("verify"),
    Part(
        "sampler",
        "draws equal those of SGLang's default sampler on a card, FlashInfer's",
        ("tests/gpu/sampler.py", "{device}", "{out}"),
        KERNELS,
    ),
    shaped("shaped", "`auto` and each drafter beside plain decoding, ours and SGLang's; a trace; memory"),
    shaped(
        "shaped-fa3",
        "FA3, SGLang's DFLASH beside",
        *("--arms", "none,plain,auto,DFLASH,DFLASH-4", "--requests", "8,32,1", "--attention", "fa3"),
    ),
    shaped(
        "shaped-plain",
        "rounds without drafts; their trace",
        *("--arms", "none,plain", "--trace", "plain", "--requests", "8,32,1"),
    ),
    real("real", "`auto` and each drafter beside plain decoding, ours and SGLang's"),
    real("real-agents", "tools and schemas enforced", "--agents", "--arms", "none,auto", "--requests", "8,32,1"),
    real(
        "real-sampled",
        "tools and schemas enforced, at temperature 0.6",
        *("--agents", "--temperature", "0.6", "--arms", "none,auto", "--requests", "8,32,1"),
    ),
    real(
        "real-own",
        "SGLang's own operators, its EAGLE3 and DFLASH or DSPARK beside",
        *("--operators", "own", "--arms", "none,plain,auto,EAGLE3,block", "--requests", "8,32,1"),
    ),
    shaped(
        "contexts",
        "a verification by context",
        *("--arms", "diffusion", "--contexts", "2048,8192,131072", "--requests", "1"),
    ),
    sanitizer("memcheck", "first", "sample_rows,accept_and_commit,fill_slots,draft_attention,verify_attention"),
    serving("triton", rehearsed=True),
    bench(
        "first",
        "draft attention and proposals beside their references",
        "--only",
        "draft_attention,propose_copies",
        "--no-compile",
    ),
    bench(
        "verify",
        "a verification beside SGLang's kernel at 2,048, 32,768 and 131,072 tokens",
        "--only",
        "verify_attention",
        "--no-compile",
    ),
    sanitizer("memcheck"),
    shaped("shaped-chain", "`ar` at 64 requests", "--arms", "ar", "--requests", "64,8,1"),
    overlap("fa3", rehearsed=False),
    sanitizer("racecheck"),
    sanitizer("initcheck"),
    kernel_tests("rest"),
    bench("all", "kernels beside their references, torch.compile and bandwidth"),
    serving("fa3", rehearsed=False),
    family("convolutions", "Lfm2ForCausalLM", "short convolutions (LFM2)"),
    family("delta-rule", "Qwen3_5ForCausalLM", "the gated delta rule (Qwen3.5)"),
    family("kda", "KimiLinearForCausalLM", "the rule by channel (Kimi Linear)"),
    family("mamba2", "NemotronHForCausalLM", "Mamba 2 (Nemotron-H)"),
    family("mrope", "Qwen2_5_VLForConditionalGeneration", "M-RoPE (Qwen2.5-VL), served for text"),
    family("windows", "Gemma3ForCausalLM", "sliding windows (Gemma 3)"),
    family("sinks", "GptOssForCausalLM", _SINKS),
    family("sinks-fa3", "GptOssForCausalLM", _SINKS, "fa3"),
    serving("fa4", rehearsed=False),
    serving("trtllm_mha", rehearsed=False),
    family("sinks-trtllm", "GptOssForCausalLM", _SINKS, "trtllm_mha"),
)
"""In this order: what was never on a card and what all requests run on, then the rest; what few cards have is last."""


def named(only: str) -> list[Part]:
    """Parts by names with commas between them. A word that is no part's name stands for all that begin so."""
    names = {part.name for part in PARTS}
    exact, begins = (tuple(w for w in only.split(",") if (w in names) == known) for known in (True, False))
    return [part for part in PARTS if part.name in exact or part.name.startswith(begins)]


def digest() -> str:
    """Digest of the sources that the parts run."""
    found = hashlib.sha256()
    for path in sorted(p for source in SOURCES for p in (ROOT / source).rglob("*.py")):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def machine(device: str) -> str:
    """The card, or the processor, as its driver names it."""
    if device != "cuda":
        where = "a CPU" if device == "cpu" else "the phantom card"
        return f"rehearsal on {where} ({platform.machine()}, {os.cpu_count()} threads)"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"no GPU answers ({error}); --device cpu rehearses what a CPU can run") from None


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that the parts rest on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def missing(part: Part) -> list[str]:
    def absent(name: str) -> bool:
        try:
            return find_spec(name) is None
        except ModuleNotFoundError:
            return True

    return [name for name in part.needs if absent(name)]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part. It may have started servers, in sessions of their own, and must be given time to end them."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(part: Part, device: str, scratch: Path, seconds: float, pair: Sequence[str] = ()) -> dict[str, Any]:
    """Run a part to its end or its limit. `status`: passed, failed, timed out, or left out (with what is missing).

    Args:
        pair: arguments that name what a part serves.
    """
    if lacking := missing(part):
        return {"status": "left out", "why": f"needs {', '.join(lacking)}"}
    figures = scratch / f"{part.name}.figures.json"
    figures.unlink(missing_ok=True)
    filled = [
        word.replace("{device}", device).replace("{out}", str(figures)).replace("{records}", str(scratch))
        for word in part.command
    ]
    if device != "cuda":
        filled += part.rehearsal or ()
    if part.serves:
        filled += pair
    parts = (ROOT / part for part in ("cpu", "kernels", "lab", "sdk", "train"))
    paths = [ROOT, *parts, SITE, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if str(p))}
    if (SITE / "sglang").is_dir():  # the kit's machine has no network: pip would try for 10 seconds
        environment |= {"PIP_NO_INDEX": "1", "WHIFLASH_CACHE": str(ROOT / CACHE)}
    began = time.monotonic()
    with (scratch / f"{part.name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *filled], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            ended = process.wait(seconds)
            status = {0: "passed", LEFT_OUT: "left out"}.get(ended, "failed")
        except subprocess.TimeoutExpired:
            end(process)
            status = "timed out"
        log.seek(0)
        tail = log.read()[-4000:]
    found = json.loads(figures.read_text()) if figures.exists() else {}
    return {
        "status": status,
        **({"why": found.get("why")} if status == "left out" else {}),
        "command": ["python", *(word.replace(str(scratch), "SCRATCH") for word in filled)],
        "seconds": round(time.monotonic() - began, 1),
        "figures": found or None,
        "tail": tail,
    }


def ended(record: Path, code: str, card: str) -> str | None:
    """How a part ended with this code on this card; None if it has not run."""
    if not record.exists():
        return None
    found = json.loads(record.read_text())
    return str(found["status"]) if (found["code"], found["machine"]) == (code, card) else None


def page(records: Path) -> str:
    """How every part ended, its checks that failed, and its figures: one line a part."""
    lines = ["| part | ended | seconds | card | found |", "|---|---|---:|---|---|"]
    for part in PARTS:
        record = records / f"{part.name}.json"
        if record.exists():
            result = json.loads(record.read_text())
            checks = ((result.get("figures") or {}).get("checks") or {}).items()
            failed = [f"{name}: {check['why']}" for name, check in checks if check["status"] == "failed"]
            last = "" if result["status"] == "passed" else (result.get("tail") or "").strip().rpartition("\n")[2]
            told = "; ".join([result.get("why") or "", *failed]).strip("; ") or last
            passed = ", ".join(name for name, check in checks if check["status"] == "passed")
            shown = told.replace("|", "/").replace("\n", " ")[:300] or f"{part.shows}{passed and f' ({passed})'}"
            facts = (part.name, result["status"], result.get("seconds", ""), result["machine"].partition(",")[0])
            lines.append(f"| {' | '.join(map(str, facts))} | {shown} |")
    return "\n".join(lines) + "\n"


def keep(archive: Path, records: Path) -> int:
    """Copy a card's records out of an archive (tar), and write their page. Returns the exit status.

    Traces and logs stay in the archive, and so do records of a rehearsal.
    """
    found: list[dict[str, Any]] = []
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and member.name.endswith(".json") and (file := packed.extractfile(member)):
                record = json.load(file)
                if "part" in record and not record["machine"].startswith("rehearsal"):
                    found.append(record)
    names = {part.name for part in PARTS}
    found = [record for record in found if record["part"] in names]
    if not found:
        print(f"{archive} has no record of a card", file=sys.stderr)
        return 1
    records.mkdir(parents=True, exist_ok=True)
    for record in found:
        (records / f"{record['part']}.json").write_text(json.dumps(record, indent=1) + "\n")
    kept = [json.loads((records / f"{name}.json").read_text()) for name in names if (records / f"{name}.json").exists()]
    listed = [(r, ", ".join(f"{name} {number}" for name, number in r["versions"].items())) for r in kept]
    about = "\n".join(sorted({f"- {r['machine']}; revision {r['code']}; {versions}" for r, versions in listed}))
    (records / PAGE).write_text(f"# Parts that a GPU has run\n\n{about}\n\n{page(records)}")
    print((records / PAGE).read_text())
    return 0


def pack(records: Path, archive: Path) -> None:
    """Write all records and logs to one archive, without traces of more than `HEAVY` bytes."""
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(records.iterdir()):
            if path.is_file() and path.stat().st_size <= HEAVY:
                packed.add(path, path.name)


def run_kit(archive: Path, arguments: Sequence[str]) -> int:
    """Unpack the kit beside its archive, if it is not there yet, and run its parts. Returns the exit status.

    The embedded pair follows once all of its pieces are beside the archive.

    arguments: as they were given; paths in them are relative to where this is called.
    """
    place, command = archive.resolve().parent / "gpu-kit", list(arguments)
    for name in ("--kit", "--records", "--pack"):
        if name in command:
            at = command.index(name) + 1
            command[at] = str(Path(command[at]).resolve())
    if not place.exists():
        with tarfile.open(archive) as packed:
            packed.extractall(place, filter="data")
    pieces = sorted(archive.parent.glob("pair-?"))
    if len(pieces) == PIECES and not (place / WHEELS).exists():
        with tarfile.open(fileobj=io.BytesIO(b"".join(map(Path.read_bytes, pieces)))) as packed:
            packed.extractall(place, filter="data")
    del command[command.index("--kit") : command.index("--kit") + 2]
    return subprocess.call([sys.executable, str(place / "tests" / "gpu" / "run.py"), *command])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu", "phantom"), default="cuda")
    parser.add_argument("--only", default="", help="names of parts, or what some begin with, with commas between them")
    parser.add_argument("--jobs", type=int, default=1, help="parts that run side by side on one card")
    parser.add_argument("--kit", type=Path, help="the kit's archive: unpack it and run what is in it")
    parser.add_argument("--pack", type=Path, help="archive of the records, written at the end")
    parser.add_argument("--keep", type=Path, help="an archive of records: keep a card's, write the page, run nothing")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="limit of a part")
    parser.add_argument("--within", type=int, help="seconds for all: the part that is under way then is ended")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--model-path", help="target of the serving parts: directory or hub id")
    parser.add_argument("--bundle", help="its drafters: directory or hub id")
    chosen = parser.parse_args(arguments)
    if chosen.keep:
        return keep(chosen.keep, chosen.records)
    if chosen.kit:
        return run_kit(chosen.kit, sys.argv[1:] if arguments is None else list(arguments))
    sys.path.insert(0, str(SITE))
    if bool(chosen.model_path) != bool(chosen.bundle):
        parser.error("--model-path and --bundle are a pair: give both or none")
    pair = ["--model-path", chosen.model_path, "--bundle", chosen.bundle] if chosen.bundle else []
    card, code = machine(chosen.device), " ".join([digest(), *pair])
    records = chosen.records.resolve() / ("" if chosen.device == "cuda" else "rehearsal")
    records.mkdir(parents=True, exist_ok=True)
    parts = named(chosen.only)
    if chosen.device != "cuda":
        parts = [p for p in parts if p.rehearsal is not None]
    before = {part.name: ended(records / f"{part.name}.json", code, card) for part in parts}
    parts.sort(key=lambda part: before[part.name] not in FAILED)  # what failed before comes first
    until, writing = time.monotonic() + (chosen.within or math.inf), threading.Lock()

    def done(part: Part) -> bool:
        """Run a part unless it passed before. Whether it failed."""
        if not chosen.again and before[part.name] == "passed":
            print(f"{part.name:24} done before")
            return False
        if (left := until - time.monotonic()) < SHORTEST:
            print(f"{part.name:24} not begun")
            return False
        result = run(part, chosen.device, records, min(chosen.seconds, left), pair)
        facts = {"part": part.name, "machine": card, "code": code, "versions": versions()}
        with writing:
            (records / f"{part.name}.json").write_text(json.dumps({**facts, **result}, indent=1) + "\n")
            (records / PAGE).write_text(f"{card}; {code}\n\n{page(records)}")
        print(f"{part.name:24} {result['status']}  {result.get('why', result.get('seconds'))}", flush=True)
        return result["status"] in FAILED

    with ThreadPoolExecutor(chosen.jobs) as beside:
        bad = sum(beside.map(done, parts))
    if chosen.pack:
        pack(records, chosen.pack)
    print(page(records))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
