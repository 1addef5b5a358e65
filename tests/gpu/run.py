"""What only a GPU can show, in parts that each end within ten minutes: `make gpu`, `make gpu-evidence`.

    python tests/gpu/run.py                        # what is left to do on this machine's GPU
    python tests/gpu/run.py --only kernels         # parts whose name begins so
    python tests/gpu/run.py --device cpu           # a rehearsal: the parts' own code, on tiny models

Each part is a process of its own. Its record, one JSON file, says what it printed, on which card, of which revision,
with which versions and how long it took; a part whose record is of this code and this card is not run again, so a
session that was cut short goes on where it was. Needs only Python for itself: the kernels' parts run where torch and
triton are installed, the others where SGLang is too, and are recorded as left out where it is not. `make docs`
writes a table of the records.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "results" / "gpu"
LEFT_OUT = 77
"""Exit status of a part that found out by itself that it cannot run here (`checks.py`)."""
PACKAGES = ("torch", "triton", "transformers", "sglang", "sglang-kernel", "flashinfer-python")
SECONDS, GRACE = 570, 20
"""Limit of a part, and how long it may take to end when it is over."""
SOURCES = ("whiflash_sglang", "kernels/whiflash_kernels", "kernels/bench", "kernels/tests", "tests/gpu")


@dataclass(frozen=True)
class Part:
    """shows: what its passing shows. command: behind the interpreter, `{device}` and `{out}` to be filled in.

    out: a scratch file for figures. evidence: only for `make gpu-evidence`. rehearsal: what is added on a CPU, None
    where nothing is rehearsed that another part does not. serves: takes the pair of `--model-path` and `--bundle`.
    """

    name: str
    shows: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    evidence: bool = False
    rehearsal: tuple[str, ...] | None = ()
    serves: bool = False


def kernel_tests(name: str, shows: str, *files: str) -> Part:
    paths = (f"kernels/tests/test_{file}.py" for file in files)
    needs = ("torch", "triton", "pytest", "hypothesis")
    return Part(f"kernels-{name}", shows, ("-m", "pytest", "-q", *paths), needs)


def serving(attention: str, rehearsed: bool) -> Part:
    shows = f"`serving-triton`, with {attention}"
    if attention == "triton":
        shows = "answers are plain decoding's, the host waits for nothing, memory is kept to; a trace"
    command = ("tests/gpu/serving.py", "--attention", attention, "--device", "{device}", "--out", "{out}")
    rehearsal = () if rehearsed else None
    return Part(f"serving-{attention}", shows, command, SERVER, rehearsal=rehearsal, serves=True)


def overlap(attention: str, rehearsed: bool) -> Part:
    shows = f"`serving-{attention}`, overlapped"
    part = serving(attention, rehearsed)
    return replace(part, name=f"overlap-{attention}", shows=shows, command=(*part.command, "--overlap"))


def family(name: str, architecture: str, kind: str, attention: str = "triton") -> Part:
    shows = f"`serving-{attention}` with {kind}"
    part = serving(attention, rehearsed=attention == "triton")
    command = (*part.command, "--family", architecture)
    return replace(part, name=f"target-{name}", shows=shows, command=command, serves=False)


def speed(concurrency: int, rehearsed: bool) -> Part:
    shows = f"speed beside plain decoding, EAGLE3 and DFLASH at {concurrency} requests"
    scale = ("--concurrency", str(concurrency))
    command = ("tests/gpu/speed.py", *scale, "--device", "{device}", "--out", "{out}")
    rehearsal = () if rehearsed else None
    return Part(f"speed-{concurrency}", shows, command, SERVER, True, rehearsal=rehearsal, serves=True)


SERVER = ("torch", "triton", "transformers", "sglang", "sgl_kernel")
_BENCH = ("kernels/bench/bench.py", "--device", "{device}", "--output", "results/gpu/kernels", "--json")
PARTS: tuple[Part, ...] = (
    kernel_tests(
        "ops",
        "blocks, routing and copies equal their references",
        "block",
        "router",
        "routing_stats",
        "copies",
    ),
    kernel_tests(
        "caches", "rings, KV and draft attention equal their references", "backlog", "catch_up", "attention"
    ),
    kernel_tests(
        "graphs", "replayed rounds equal eager ones", "graphs", "drafts", "draft_passes", "dispatch"
    ),
    kernel_tests("upstream", "kernels take the inputs of SGLang's", "upstream", "bench"),
    Part(
        "kernels-speed",
        "kernels beside their references, torch.compile and bandwidth",
        _BENCH,
        ("torch", "triton"),
        rehearsal=None,
    ),
    *(serving(attention, attention == "triton") for attention in ("triton", "fa3", "fa4", "trtllm_mha")),
    *(overlap(attention, attention == "triton") for attention in ("triton", "fa3")),
    family("convolutions", "Lfm2ForCausalLM", "short convolutions (LFM2)"),
    family("delta-rule", "Qwen3_5ForCausalLM", "the gated delta rule (Qwen3.5)"),
    family("kda", "KimiLinearForCausalLM", "the rule by channel (Kimi Linear)"),
    family("mamba2", "NemotronHForCausalLM", "Mamba 2 (Nemotron-H)"),
    family("mrope", "Qwen2_5_VLForConditionalGeneration", "M-RoPE (Qwen2.5-VL), served for text"),
    *(
        family(
            name,
            "GptOssForCausalLM",
            "sliding windows in a pool of their own and attention sinks (gpt-oss)",
            attention,
        )
        for name, attention in (("sinks", "triton"), ("sinks-fa3", "fa3"), ("sinks-trtllm", "trtllm_mha"))
    ),
    family("windows", "Gemma3ForCausalLM", "sliding windows (Gemma 3)"),
    Part(
        "shaped",
        "rounds of an 8B-shaped random target end, with another pair's acceptance",
        ("tests/gpu/shaped.py", "--device", "{device}", "--out", "{out}"),
        SERVER,
        evidence=True,
    ),
    *(speed(concurrency, concurrency == 8) for concurrency in (1, 8, 32, 64)),
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


def versions() -> dict[str, str]:
    """Of what the parts rest on; what is not installed is not named."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def missing(part: Part) -> list[str]:
    return [name for name in part.needs if find_spec(name) is None]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part. It may have started servers, in sessions of their own, and must be given time to end them."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(part: Part, device: str, scratch: Path, seconds: int, pair: Sequence[str] = ()) -> dict[str, Any]:
    """Run a part to its end or its limit. `status`: passed, failed, timed out, or left out (with what is missing).

    Args:
        pair: arguments that name what a part serves.
    """
    if lacking := missing(part):
        return {"status": "left out", "why": f"needs {', '.join(lacking)}"}
    figures = scratch / f"{part.name}.figures.json"
    figures.unlink(missing_ok=True)
    filled = [word.replace("{device}", device).replace("{out}", str(figures)) for word in part.command]
    if device == "cpu":
        filled += part.rehearsal or ()
    if part.serves:
        filled += pair
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
    parser.add_argument("--model-path", help="target of the serving parts: directory or hub id")
    parser.add_argument("--bundle", help="its drafters: directory or hub id")
    chosen = parser.parse_args(arguments)
    if bool(chosen.model_path) != bool(chosen.bundle):
        parser.error("--model-path and --bundle are a pair: give both or none")
    pair = ["--model-path", chosen.model_path, "--bundle", chosen.bundle] if chosen.bundle else []
    card, code = machine(chosen.device), " ".join([digest(), *pair])
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
        result = run(part, chosen.device, records, chosen.seconds, pair)
        facts = {"part": part.name, "machine": card, "code": code, "versions": versions()}
        record.write_text(json.dumps({**facts, **result}, indent=1) + "\n")
        bad += result["status"] in ("failed", "timed out")
        print(f"{part.name:24} {result['status']}  {result.get('why', result.get('seconds'))}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
