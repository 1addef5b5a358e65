"""Measure every op against its reference, its compiled reference and the floor of the machine it runs on.

    python kernels/bench/bench.py                                    # on a GPU, at the shapes of Qwen3-8B
    python kernels/bench/bench.py --device cpu --shape smollm2-135m  # the CPU path, at the embedded target's

Results go to kernels/bench/results/<shape>-<device>.json and .md, with quantiles, versions and the revision.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cases import KERNELS, Bench, Case, CaseSizes, backlog_cases, catch_up_cases, layer_cases, routing_cases
from measure import Call, Ceilings, Timing, ceilings, provenance, time_call
from shapes import SHAPES

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class BenchRow:
    """The measured time of one implementation (`variant`) of an op in one case, beside the GPU's floor."""

    op: str
    case: str
    variant: str
    timing: Timing
    floor_us: float | None
    """None on a CPU: inputs of these sizes stay in its caches, so bandwidth says nothing."""
    share_of_copy_bandwidth: float | None


def variants(case: Case, device: torch.device, compiled: bool) -> Iterator[tuple[str, Call]]:
    """Yield the implementations of a case, by name."""
    if device.type == "cuda":
        yield "triton", case.call
    yield "torch", case.call
    if compiled:
        torch.compiler.reset()  # or the cases of one op would share its limit of recompilations
        yield "torch.compile", torch.compile(case.compilable or case.call, dynamic=False)
    yield from case.others.items()


def measure(
    case: Case, device: torch.device, limits: Ceilings | None, *, compiled: bool, budget_ms: int
) -> Iterator[BenchRow]:
    for name, call in variants(case, device, compiled):
        chosen = {"WHIFLASH_KERNELS": "triton" if name == "triton" else "torch"}
        with torch.no_grad(), mock.patch.dict(os.environ, chosen):  # what records gradients runs torch
            timing = time_call(call, device, budget_ms)
        floor = share = None
        if limits is not None:
            floor = limits.floor_us(case.moved_bytes, case.flops)
            share = case.moved_bytes / (1e-6 * timing.median_us) / limits.copy_bytes_per_second
        yield BenchRow(case.op, case.label, name, timing, floor, share)


def all_cases(bench: Bench, only: Sequence[str] = ()) -> Iterator[Case]:
    """Yield cases of every op, or of those in `only`; on a GPU also at sizes that fill the chip."""
    on_gpu = bench.device.type == "cuda"
    fill = {routing_cases: 1024, backlog_cases: bench.slots - 1} if on_gpu else {}
    for family in (*KERNELS, catch_up_cases, layer_cases):
        cases = family(bench, fill[family]) if family in fill else family(bench)
        yield from (case for case in cases if not only or case.op in only)


def markdown(document: dict, rows: list[BenchRow]) -> str:
    lines = [f"# Ops at the shapes of {document['shape']} on {document['device']}", ""]
    lines += [f"- {key}: {value}" for key, value in document["provenance"].items()]
    limits = document["ceilings"]
    if limits:
        lines += [
            f"- copy bandwidth: {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
            f"bf16 products: {limits['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s, "
            f"shortest call: {limits['launch_us']:.1f} us (each measured in this run)"
        ]
    lines += [
        "",
        "| op | case | implementation | median us | p10 | p90 | floor us | of copy bandwidth |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        t = row.timing
        share = "" if row.share_of_copy_bandwidth is None else f"{row.share_of_copy_bandwidth:.0%}"
        floor = "" if row.floor_us is None else f"{row.floor_us:.1f}"
        times = f"{t.median_us:.1f} | {t.p10_us:.1f} | {t.p90_us:.1f}"
        lines.append(f"| {row.op} | {row.case} | {row.variant} | {times} | {floor} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-8b")
    parser.add_argument("--budget-ms", type=int, default=200, help="how long each call is repeated")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile of the references")
    parser.add_argument("--only", default="", help="ops, with commas between")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here, so nothing was measured; --device cpu measures the CPU path", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the CPU path is timed in one thread's processor time
    origin = provenance()
    shape = SHAPES[arguments.shape]
    limits = ceilings(device) if device.type == "cuda" else None
    on_gpu = device.type == "cuda"
    sizes = CaseSizes(long=(32_768, 131_072) if on_gpu else ())
    bench = Bench(shape, device, 256 if on_gpu else 32, sizes)
    rows: list[BenchRow] = []
    only = [op for op in arguments.only.split(",") if op]
    for case in all_cases(bench, only):
        print(f"{case.op}, {case.label}", file=sys.stderr, flush=True)
        rows += measure(case, device, limits, compiled=not arguments.no_compile, budget_ms=arguments.budget_ms)
    name = origin["gpu"] if device.type == "cuda" else origin["cpu"].partition(", ")[0]
    document = {
        "shape": shape.name,
        "device": name,
        "provenance": origin,
        "ceilings": None if limits is None else asdict(limits),
        "rows": [asdict(row) for row in rows],
    }
    text, table = json.dumps(document, indent=1) + "\n", markdown(document, rows)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{arguments.shape} {name} {arguments.only}".lower()).strip("-")
    (arguments.output / f"{slug}.json").write_text(text)
    (arguments.output / f"{slug}.md").write_text(table)
    print(text if arguments.json else table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
