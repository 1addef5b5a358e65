"""Compile every kernel ahead of time for several GPU architectures, without a GPU, and report its resources.

    python kernels/bench/aot.py                    # table on stdout
    python kernels/bench/aot.py --write            # also kernels/bench/results/aot.json and aot.md
    python kernels/bench/aot.py --batches 2000     # how many compilations so many random batches ask for

The launches are not described a second time here: the cases of the bench run on meta tensors, and each launch is
compiled instead of run, with the arguments, constants and warps that it would have had.
Registers, stack and shared memory are read from the machine code by Triton's own copy of ``cuobjdump``; a spill
lives in the stack frame, so a stack of 0 bytes means that nothing was spilled.
"""

import argparse
import importlib
import json
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
import whiflash_kernels as ops
from cases import KERNELS, Bench, CaseSizes, attention_cases, catch_up_cases, router_cases, routing_cases, verify_cases
from measure import provenance
from shapes import SHAPES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from whiflash_kernels import triton_kernels
from whiflash_kernels.reference import attention
from whiflash_kernels.warm import Served, warm_up

RESULTS = Path(__file__).parent / "results"
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one program may have, by compute capability (CUDA C++ Programming Guide)."""
CAPABILITIES = tuple(SHARED_KB)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel with one launch's arguments, compiled for one architecture: its resources."""

    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


class HostlessDriver:
    """Replaces the CUDA driver: it names a target, and is never asked to load or launch anything."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def instead_of_launching(capability: int, act: Callable[..., None]) -> Iterator[None]:
    """Make Triton take tensors of any device as if on a GPU of ``capability``, and call ``act`` in place of a launch.

    act: takes the kernel, its grid and the arguments of the launch.
    """
    driver.set_active(HostlessDriver(capability))  # for good: this process launches nothing
    with ExitStack() as stack:
        for name in ("dispatch", "warm"):
            stack.enter_context(mock.patch(f"whiflash_kernels.{name}.backend_for", return_value="triton"))
        stack.enter_context(mock.patch.object(JITFunction, "__getitem__", lambda *of: partial(act, *of)))
        yield


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


index = partial(meta, dtype=torch.int64)
ints = partial(meta, dtype=torch.int32)
chances = partial(meta, dtype=torch.float32)

QWEN, SMOL = SHAPES["qwen3-8b"], SHAPES["smollm2-135m"]
SIZES = CaseSizes(batches=(1, 32, 256), backlogs=(64,), rows=(16,), context=40_960)
EIGHT = replace(SIZES, batches=(8,))
CASES = (
    (QWEN, SIZES, (*KERNELS, catch_up_cases)),
    (SMOL, EIGHT, (attention_cases, verify_cases, catch_up_cases)),
    (replace(QWEN, name="8 heads of queries to one of keys", heads=64), EIGHT, (attention_cases, verify_cases)),
    (replace(QWEN, name="heads of 256", heads=16, dim=256), EIGHT, (attention_cases, verify_cases)),
    (replace(QWEN, name="fp32", dtype=torch.float32), EIGHT, (routing_cases, router_cases)),
    (replace(SMOL, name="fp16, odd rows", vocab=50_257, dtype=torch.float16), EIGHT, (routing_cases,)),
)
"""Compiled cases: shapes, sizes, and makers of cases."""


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each case's name and call; those that the bench does not measure come last."""
    for shape, sizes, families in CASES:
        bench = Bench(shape, torch.device("meta"), 256, sizes)
        for case in (case for family in families for case in family(bench)):
            yield f"{case.op}, {case.label}, {shape.name}", case.compilable or case.call
    rows, slots = meta(512, QWEN.vocab), index(32)
    yield "routing_stats, 32 of 512 rows, Qwen3-8B", lambda: ops.routing_stats(rows, slots)
    q, pool, table = meta(512, 32, 128), meta(4096, 8, 128), ints(257, 40_960)
    arguments = (q, pool, pool, table, slots, slots, 16, 16, False, 128**-0.5, 4096, 40_960)
    yield "draft_attention, 32 x 16 rows in a window, Qwen3-8B", lambda: attention.draft_attention(*arguments)
    for label, shape, pool_dtype, how in VERIFIED:
        yield f"verify_attention, {label}", partial(verify, shape, pool_dtype, **how)
    yield (
        "choose_drafts, 32 requests, the host's candidates",
        lambda: choose(32, 24, host_drafts(32, 49), None, None, 128),
    )
    yield "propose_copies, 32 requests, behind drafts", lambda: copy(32, behind=True)
    for masked in (False, True):
        yield f"sample_rows, 160 rows, Qwen3-8B{', masked' * masked}", partial(sample, 32, 160, masked)


VERIFIED: tuple[tuple[str, tuple[int, int, int], torch.dtype, dict[str, Any]], ...] = (
    ("8-bit KV", (32, 8, 128), torch.float8_e5m2, {}),
    ("a window and sinks, gpt-oss", (64, 8, 64), torch.bfloat16, {"window": 128, "sinks": meta(64)}),
    ("a window and a cap, Gemma 2", (16, 8, 256), torch.bfloat16, {"window": 4096, "cap": 50.0}),
)
"""Verifications: heads, KV heads and their dimensions, the pools' dtype, and what masks or caps them."""


def verify(shape: tuple[int, int, int], pool_dtype: torch.dtype, **how: Any) -> None:
    heads, kv_heads, dim = shape
    q, kv, pool = meta(512, heads, dim), meta(512, kv_heads, dim), meta(4096, kv_heads, dim, dtype=pool_dtype)
    plan = index(33), ints(33), index(4096)
    ops.verify_attention(q, kv, kv, meta(512, heads, dim), pool, pool, *plan, most=17, scale=dim**-0.5, **how)


def kernel_names() -> set[str]:
    """Return the names of the package's kernels, found by Triton's decorator and the naming rule ``*_kernel``."""
    modules = [
        importlib.import_module(f"{triton_kernels.__name__}.{info.name}")
        for info in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    names = [
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    ]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"kernels of one name: {twice}; a report could not say which is which, so rename one")
    return set(names)


DRAFTERS = (((0, 2, 4), 4096, True), ((0, 1, 2, 3, 5), 4096, False))
"""Chunks of two drafters, their width, and whether they start from a feature."""
RINGS = ops.BacklogRings(meta(257, 64, 6 * 4096), index(257, 64))
TEXT, TABLE, STOPS = index(257, 40_960), ints(257, 40_960), index(257, 8)
CANDIDATES = 2


def drafted(requests: int, width: int) -> ops.Drafts:
    lives = chances(requests, width)
    return ops.Drafts(index(requests, width), index(requests), lives, lives, ints(requests))


def host_drafts(requests: int, columns: int) -> ops.Drafts:
    shape = requests, CANDIDATES
    return ops.Drafts(index(*shape, columns), index(*shape), chances(*shape, columns))


def choose(
    requests: int,
    width: int | ops.Drafts,
    from_host: ops.Drafts | None,
    appended: ops.Drafts | None,
    copies: ops.Drafts | None,
    limit: int,
) -> ops.Chosen:
    laid = drafted(requests, width) if isinstance(width, int) else width
    slots = index(requests)
    beside = {"appended": appended, "from_host": from_host, "at": index(requests, CANDIDATES)}
    beside |= {"copies": copies, "limits": slots, "drawn": slots}
    return ops.choose_drafts(laid, slots, slots, TEXT, **beside, worth=0.1, most_drafts=limit, stops=STOPS)


def copy(requests: int, *, behind: bool) -> None:
    slots, judged = index(requests), (chances(requests), chances(requests, 8, 4), ints(8))
    drafts = (slots, chances(requests, 24)) if behind else None
    ops.propose_copies(TEXT, slots, slots, index(257), slots, *judged, width=24, worth=0.1, behind=drafts)


def sample(requests: int, rows: int, masked: bool) -> None:
    masks = (ints(rows, QWEN.vocab // 32), index(rows)) if masked else None
    slots, table = index(requests), ops.SamplingTable(chances(257, 4), index(257))
    ops.sample_rows(chances(rows, QWEN.vocab), ints(requests + 1), slots, slots, table, masks=masks)


def fill(requests: int, count: int) -> None:
    slots = ops.GraphSlots(ints(count), ints(count + 1), index(count), ints(count), index(count))
    ops.fill_slots(ints(requests), index(requests), index(requests), slots, rows=2 * count, empty=1)


def run_round(rng: random.Random, most_requests: int, widest: int) -> None:
    """Launch the ops that a round runs between models, for any batch and any split of it among drafters."""
    requests = rng.randint(1, most_requests)
    widths = [rng.randint(1, widest) for _ in range(rng.randint(1, 3))]
    members = [rng.randint(1, requests) for _ in widths]
    width, rows = max(widths), requests + rng.randint(0, 4 * requests)
    slots, lengths = index(requests), index(requests)
    for own, count in zip(widths, members, strict=True):
        ops.cut_drafts(chances(count, own), chances(13), chances(10), index(count))
    parts = [(index(count), drafted(count, own)) for count, own in zip(members, widths, strict=True)]
    laid = ops.lay_drafts(parts, slots, lengths, width=width, confidences=width, vocabulary=QWEN.vocab, text=TEXT)
    chosen = choose(
        requests,
        laid,
        rng.choice((None, host_drafts(requests, 2 * widest + 1))),
        rng.choice((None, drafted(requests, rng.randint(1, widest)))),
        rng.choice((None, drafted(requests, 16))),
        rng.randint(1, 4 * requests),
    )
    packed = ops.prepare_mixed_block(slots, chosen.tokens, chosen.widths, lengths, slots, TABLE, rows=rows)
    ids = packed.input_ids
    fill(requests, requests + rng.randint(0, most_requests // 16))
    ops.accept_and_commit(
        ids, ids, packed.qo_indptr, lengths, stride=width + 1, request_slots=slots, stops=STOPS, text=TEXT
    )
    sample(requests, rows, masked=rng.random() < 0.5)
    captured = rng.choice((None, most_requests))
    claims = captured and ops.Claims(index(captured), index(2, captured), index(2, captured))
    ops.claim_backlogs(index(2, 257), slots, lengths, index(2, requests), into=claims or None)
    # Behind a prefill.
    ops.park(RINGS, meta(rows, RINGS.features.shape[2]), ids, slots, lengths, slots, slots, max_length=1)
    # All drafters' claims, of which one takes its own: an odd number of them starts at an odd place.
    begins, ends = (index(2 * requests)[requests:] for _ in range(2))
    for chunks, hidden, starts in DRAFTERS:
        columns = {"chunks": chunks, "chunk_width": hidden}
        ops.unpark(RINGS, slots, begins, ends, TABLE, rows=rng.randint(1, rows), **columns)
        own = None if rng.random() < 0.5 else index(rng.randint(1, requests))
        columns["chunks"] = chunks if starts else ()
        tail = meta(captured or 1, len(columns["chunks"]) * hidden)
        into = ops.PassInputs(*(index(captured) for _ in range(4)), tail, chances(13)) if captured else None
        ops.draft_inputs(RINGS, own, slots, lengths, slots, slots, chances(13), into=into, **columns)
    for behind in (False, True):
        copy(requests, behind=behind)


def compilations(batches: int, most_requests: int = 256, widest: int = 16) -> dict[str, int]:
    """Return how many variants of each kernel Triton would compile for random batches, beyond those of `warm_up`."""
    rng = random.Random(0)
    served = Served(
        TEXT,
        TABLE,
        STOPS,
        RINGS,
        index(2, 257),
        ops.SamplingTable(chances(257, 4), index(257)),
        most_requests,
        widths={7, widest},
        candidates=(CANDIDATES, 2 * widest + 1),
        vocabulary=QWEN.vocab,
        bins=11,
        columns=DRAFTERS,
        copied=(24, 8),
    )
    keys: set[Any] = set()

    def bind(kernel: JITFunction[Any], _: Any, *args: Any, **options: Any) -> None:
        """Note the variant of the kernel that Triton would compile for these arguments."""
        binder = kernel.device_caches[90][4]
        _, specialization, chosen = binder(*args, debug=False, instrumentation_mode="", **options)
        keys.add((kernel.fn.__name__, *map(str, specialization), str(chosen)))

    with instead_of_launching(90, bind):
        warm_up(served)
        for count in range(1, most_requests + most_requests // 16 + 1):  # where graphs are captured
            fill(0, count)
        earlier = set(keys)
        for _ in range(batches):
            run_round(rng, most_requests, widest)
    counts = dict.fromkeys((key[0] for key in earlier), 0) | Counter(key[0] for key in keys - earlier)
    return dict(sorted(counts.items()))


def resources(cubin: bytes) -> dict[str, int]:
    """Return the resources that ``cuobjdump -res-usage`` reports of the one function in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", output)}


def compile_everything() -> list[Compiled]:
    """Compile the launches of every case for every architecture."""
    report: list[Compiled] = []
    compiled: list[Any] = []

    def compile_only(kernel: JITFunction[Any], grid: Any, *args: Any, **options: Any) -> None:
        compiled.append(kernel.run(*args, grid=grid, warmup=True, **options))

    for capability in CAPABILITIES:
        with instead_of_launching(capability, compile_only):
            named = []
            for case, run in cases():
                compiled.clear()  # of what making the case has launched
                run()
                named += [(case, kernel) for kernel in compiled]
            for case, kernel in named:
                used, warps = resources(kernel.asm["cubin"]), kernel.metadata.num_warps
                report.append(
                    Compiled(
                        kernel=kernel.metadata.name,
                        case=case,
                        target=f"sm_{capability}",
                        warps=warps,
                        registers=used["REG"],
                        stack_bytes=used["STACK"],
                        local_bytes=used["LOCAL"],
                        shared_bytes=kernel.metadata.shared,
                    )
                )
    return report


def markdown(report: list[Compiled], origin: dict[str, str]) -> str:
    """Return a table with a row for each kernel and case: registers and shared memory by architecture."""
    targets = [f"sm_{capability}" for capability in CAPABILITIES]
    lines = [
        "# Kernels compiled ahead of time",
        "",
        "Written by `python kernels/bench/aot.py --write`; no GPU is involved. Registers a thread / shared bytes.",
        *(f"- {key}: {value}" for key, value in origin.items()),
        "",
        f"| op and case | kernel | warps | {' | '.join(targets)} | stack bytes |",
        f"|---|---|---|{'---|' * len(targets)}---|",
    ]
    rows: dict[tuple[str, str], dict[str, Compiled]] = {}
    for entry in report:
        rows.setdefault((entry.case, entry.kernel), {})[entry.target] = entry
    for (case, kernel), by_target in rows.items():
        warps = " or ".join(str(n) for n in sorted({entry.warps for entry in by_target.values()}))
        programs = [by_target[t] for t in targets]
        cells = [f"{program.registers} / {program.shared_bytes}" for program in programs]
        stack = max(entry.stack_bytes for entry in by_target.values())
        lines.append(f"| {case} | `{kernel}` | {warps} | {' | '.join(cells)} | {stack} |")
    return "\n".join(lines) + "\n"


def most_stack() -> int:
    """Return a kernel's allowed bytes of stack: Triton 3.6 spills up to two 64-bit words in two kernels, 3.8 none."""
    return 16 if triton.__version__.startswith("3.6.") else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write results/aot.json and results/aot.md")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--batches", type=int, help="count what so many random batches compile, and nothing else")
    arguments = parser.parse_args()
    if arguments.batches:
        print(json.dumps(compilations(arguments.batches)))
        return 0
    report, origin = compile_everything(), provenance()
    document = json.dumps({"provenance": origin, "kernels": [asdict(entry) for entry in report]}, indent=1)
    if arguments.write:
        (RESULTS / "aot.json").write_text(document + "\n")
        (RESULTS / "aot.md").write_text(markdown(report, origin))
    print(document if arguments.json else markdown(report, origin))
    missing = kernel_names() - {entry.kernel for entry in report}
    limits = {f"sm_{capability}": 1024 * kb for capability, kb in SHARED_KB.items()}
    unfit = [
        entry
        for entry in report
        if entry.stack_bytes > most_stack() or entry.local_bytes or entry.shared_bytes > limits[entry.target]
    ]
    if missing or unfit:
        print(f"not compiled: {sorted(missing)}; spilled, or too large: {unfit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
