"""Compile every kernel ahead of time for several GPU architectures, without a GPU, and report its resources.

    python kernels/bench/aot.py                    # table on stdout
    python kernels/bench/aot.py --write            # also kernels/bench/results/aot.json and aot.md
    python kernels/bench/aot.py --batches 2000     # how many compilations so many random batches ask for

The launches are not described a second time here: the ops themselves run on meta tensors at the shipped shapes,
and each launch is compiled instead of run, with the arguments, constants and warps that it would have had.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from occupancy import MULTIPROCESSORS, programs_at_once
from provenance import provenance
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from whiflash_kernels import (
    BacklogRings,
    DFlashWeights,
    Drafts,
    Eagle3Weights,
    HostDrafts,
    KVPools,
    triton_kernels,
)
from whiflash_kernels.triton_kernels import (
    attention,
    backlog,
    block,
    catch_up,
    copies,
    drafts,
    passes,
    router,
    routing,
)
from whiflash_kernels.warm import Served, warm_up

RESULTS = Path(__file__).parent / "results"
CAPABILITIES = tuple(MULTIPROCESSORS)
ASKED = ("dispatch", "warm")
VOICES = 2
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel, as one launch of an op would have it, for one architecture."""

    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    programs_at_once: int
    """Of one multiprocessor."""


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
def compiling_instead_of_launching(capability: int) -> Iterator[list[Any]]:
    """Inside, a launch compiles its kernel for ``capability`` and appends it to the list."""
    compiled: list[Any] = []

    def launcher(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **options: Any) -> None:
            compiled.append(kernel.run(*args, grid=grid, warmup=True, **options))

        return compile_only

    driver.set_active(HostlessDriver(capability))  # for good: this process launches nothing
    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield compiled


@contextmanager
def keying_instead_of_launching(capability: int) -> Iterator[set[Any]]:
    """Inside, a launch adds what Triton would compile a kernel for to the set, and compiles nothing."""
    keys: set[Any] = set()

    def launcher(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
        def bind_only(*args: Any, **options: Any) -> None:
            binder = kernel.device_caches[capability][4]
            _, specialization, chosen = binder(*args, debug=False, instrumentation_mode="", **options)
            keys.add((kernel.fn.__name__, *map(str, specialization), str(chosen)))

        return bind_only

    driver.set_active(HostlessDriver(capability))  # for good: this process launches nothing
    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield keys


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def index(*size: int) -> torch.Tensor:
    return meta(*size, dtype=torch.int64)


def slot_table() -> torch.Tensor:
    return meta(257, 40_960, dtype=torch.int32)


def text() -> torch.Tensor:
    return index(257, 40_960)


def pools(layers: int, heads: int, dim: int) -> KVPools:
    return KVPools(*(tuple(meta(4096, heads, dim) for _ in range(layers)) for _ in range(2)))


def run_park(requests: int, hidden: int, captured: int) -> None:
    width = captured * hidden
    rings = BacklogRings(meta(64, 64, width), index(64, 64))
    rows = requests * 16
    args = (index(requests), index(requests), meta(requests, dtype=torch.int32), index(requests))
    backlog.park(rings, meta(rows, width), index(rows), *args, 16)


def run_unpark(requests: int, hidden: int, captured: int, chunks: tuple[int, ...]) -> None:
    rings = BacklogRings(meta(64, 64, captured * hidden), index(64, 64))
    args = (index(requests), index(requests), index(requests), slot_table())
    backlog.unpark(rings, *args, 64 * requests, chunks, hidden)


def run_prepare(requests: int) -> None:
    drafts = index(requests, 15)
    slots = slot_table()
    args = (index(requests), drafts, index(requests), index(requests), index(requests), slots)
    block.prepare_mixed_block(*args, requests * 16, 0)


def run_accept(requests: int) -> None:
    indptr, ids = meta(requests + 1, dtype=torch.int32), index(requests * 16)
    kept = (index(requests), index(257, 8), text())
    block.accept_and_commit(ids, ids, indptr, index(requests), 16, 0, *kept)


def run_claim(requests: int) -> None:
    backlog.claim_backlogs(index(2, 257), index(requests), index(requests), index(2, requests))


def run_inputs(requests: int, hidden: int, captured: int, chunks: tuple[int, ...]) -> None:
    rings = BacklogRings(meta(64, 64, captured * hidden), index(64, 64))
    passes.draft_inputs(rings, *(index(requests) for _ in range(5)), chunks, hidden)


def run_pass_rows(requests: int) -> None:
    passes.pass_rows(slot_table(), *(index(requests) for _ in range(3)), 0, 16, 7)


def chances(*size: int) -> torch.Tensor:
    return meta(*size, dtype=torch.float32)


def run_cut(requests: int) -> None:
    drafts.cut_drafts(chances(requests, 15), chances(12), chances(10), index(requests), 0.1)


def drafted(requests: int, width: int) -> Drafts:
    lives = chances(requests, width)
    return Drafts(index(requests, width), index(requests), lives, lives)


def run_lay(requests: int) -> None:
    parts = [(index(requests // 2), drafted(requests // 2, width)) for width in (7, 15)]
    drafts.lay_drafts(parts, index(requests), index(requests), 24, 15, 1 << 17, text())


def run_choose(requests: int) -> None:
    laid = drafted(requests, 24)
    from_host = HostDrafts(
        index(requests, 2, 49), chances(requests, 2, 49), index(requests, 2), index(requests, 2)
    )
    others = (
        None,
        drafted(requests, 24),
        from_host,
        drafted(requests, 24),
        index(requests),
        0.1,
        4 * requests,
    )
    drafts.choose_drafts(laid, index(requests), index(requests), text(), *others)


def run_dflash(layers: int, hidden: int, chunks: int, heads: int, dim: int) -> None:
    weights = DFlashWeights(
        meta(hidden, chunks * hidden),
        meta(hidden),
        meta(layers * 2 * heads * dim, hidden),
        meta(layers, dim),
        1e-6,
    )
    rope = meta(40_960, dim, dtype=torch.float32)
    features = meta(16, chunks * hidden)
    catch_up.dflash_catch_up(features, index(16), index(16), weights, rope, pools(layers, heads, dim))


def run_eagle3(hidden: int, heads: int, dim: int, vocab: int) -> None:
    weights = Eagle3Weights(
        meta(hidden, 3 * hidden),
        meta(vocab, hidden),
        meta(hidden),
        meta(hidden),
        meta(2 * heads * dim, 2 * hidden),
        1e-6,
    )
    rope = meta(40_960, dim, dtype=torch.float32)
    features, args = meta(16, 3 * hidden), (index(16), index(16), index(16))
    catch_up.eagle3_catch_up(features, *args, weights, rope, pools(1, heads, dim))


def run_router(rows: int, hidden: int, units: int, dtype: torch.dtype) -> None:
    layers = (
        meta(units, hidden, dtype=dtype),
        meta(units, dtype=dtype),
        meta(1, units, dtype=dtype),
        meta(1, dtype=dtype),
    )
    router.router_mlp(meta(rows, hidden), *layers)


def run_attention(
    requests: int, width: int, heads: int, kv_heads: int, dim: int, window: int | None = None
) -> None:
    q, pool = meta(requests * width, heads, dim), meta(4096, kv_heads, dim)
    table = slot_table()
    args = (table, index(requests), meta(requests, dtype=torch.int32))
    longest = table.shape[1]
    attention.draft_attention(q, pool, pool, *args, width, width, width == 1, dim**-0.5, window, longest)


def run_copies(requests: int, *, behind: bool) -> None:
    numbers, back = [index(requests) for _ in range(3)], index(257)
    judged = (chances(requests), chances(requests, 8, 4), meta(8, dtype=torch.int32))
    drafts = (index(requests), chances(requests, 24)) if behind else None
    slots, lengths, limits = numbers
    copies.propose_copies(text(), slots, lengths, back, limits, *judged, 24, 0.1, 1, drafts)


CASES: dict[str, Callable[[], object]] = {
    "routing_stats, 1 row of 151,936, bf16": lambda: routing.routing_stats(meta(1, 151_936), None),
    "routing_stats, 32 of 512 rows of 151,936, bf16": lambda: routing.routing_stats(
        meta(512, 151_936), index(32)
    ),
    "routing_stats, 1024 rows of 151,936, bf16": lambda: routing.routing_stats(meta(1024, 151_936), None),
    "routing_stats, 8 rows of 151,936, fp32": lambda: routing.routing_stats(
        meta(8, 151_936, dtype=torch.float32), None
    ),
    "routing_stats, 8 rows of 50,257, fp16": lambda: routing.routing_stats(
        meta(8, 50_257, dtype=torch.float16), None
    ),
    "park, Qwen3-8B, 32 requests": lambda: run_park(32, 4096, 7),
    "unpark, Qwen3-8B DFlash, 32 requests": lambda: run_unpark(32, 4096, 7, (0, 2, 3, 4, 5)),
    "unpark, Qwen3-8B EAGLE-3, 256 requests": lambda: run_unpark(256, 4096, 7, (1, 3, 6)),
    "prepare_mixed_block, 1 request": lambda: run_prepare(1),
    "prepare_mixed_block, 32 requests": lambda: run_prepare(32),
    "prepare_mixed_block, 256 requests": lambda: run_prepare(256),
    "accept_and_commit, 32 requests": lambda: run_accept(32),
    "dflash_catch_up, Qwen3-8B": lambda: run_dflash(5, 4096, 5, 8, 128),
    "dflash_catch_up, SmolLM2-135M": lambda: run_dflash(2, 576, 5, 3, 64),
    "eagle3_catch_up, Qwen3-8B": lambda: run_eagle3(4096, 8, 128, 151_936),
    "eagle3_catch_up, SmolLM2-135M": lambda: run_eagle3(576, 3, 64, 49_152),
    "draft_attention, chain step, Qwen3-8B, 1 request": lambda: run_attention(1, 1, 32, 8, 128),
    "draft_attention, chain step, Qwen3-8B, 256 requests": lambda: run_attention(256, 1, 32, 8, 128),
    "draft_attention, block of 16, Qwen3-8B, 1 request": lambda: run_attention(1, 16, 32, 8, 128),
    "draft_attention, block of 16 in a window, Qwen3-8B, 32 requests": lambda: run_attention(
        32, 16, 32, 8, 128, 4096
    ),
    "draft_attention, block of 16, 8 heads of queries to one of keys, 8 requests": lambda: run_attention(
        8, 16, 64, 8, 128
    ),
    "draft_attention, block of 16, heads of 256, 8 requests": lambda: run_attention(8, 16, 16, 8, 256),
    "draft_attention, block of 8, SmolLM2-135M, 8 requests": lambda: run_attention(8, 8, 9, 3, 64),
    "propose_copies, 24 tokens, 32 requests": lambda: run_copies(32, behind=False),
    "propose_copies, behind drafts, 32 requests": lambda: run_copies(32, behind=True),
    "claim_backlogs, 2 drafters, 32 requests": lambda: run_claim(32),
    "draft_inputs, Qwen3-8B EAGLE-3, 32 requests": lambda: run_inputs(32, 4096, 7, (1, 3, 6)),
    "draft_inputs, no tail, 32 requests": lambda: run_inputs(32, 4096, 7, ()),
    "pass_rows, block of 16, 32 requests": lambda: run_pass_rows(32),
    "cut_drafts, 15 tokens, 32 requests": lambda: run_cut(32),
    "lay_drafts, 2 drafters, 32 requests": lambda: run_lay(32),
    "lay_drafts, 2 drafters, 256 requests": lambda: run_lay(256),
    "choose_drafts, 24 tokens, 32 requests": lambda: run_choose(32),
    "choose_drafts, 24 tokens, 256 requests": lambda: run_choose(256),
    "router_mlp, 1 row, Qwen3-8B, bf16": lambda: run_router(1, 4096, 512, torch.bfloat16),
    "router_mlp, 32 rows, Qwen3-8B, fp32": lambda: run_router(32, 4096, 512, torch.float32),
}


def kernel_names() -> set[str]:
    """Every kernel that the package defines, by Triton's decorator and the naming rule ``*_kernel``."""
    modules = [
        importlib.import_module(f"{triton_kernels.__name__}.{found.name}")
        for found in pkgutil.iter_modules(triton_kernels.__path__)
    ]
    names = [
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    ]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"kernels of one name: {twice}; a report could not say which is which, so rename one"
        )
    return set(names)


DRAFTERS = (((0, 2, 4), 4096, True), ((0, 1, 2, 3, 5), 4096, False))
"""Chunks of two drafters, their width, and whether they start from a feature."""
RINGS = BacklogRings(meta(257, 64, 6 * 4096), index(257, 64))


def run_round(rng: random.Random, most_requests: int, widest: int) -> None:
    """What a round launches between models for any batch, whoever drafts how much in it."""
    requests = rng.randint(1, most_requests)
    widths = [rng.randint(1, widest) for _ in range(rng.randint(1, 3))]
    members = [rng.randint(1, requests) for _ in widths]
    width, rows = max(widths), requests + rng.randint(0, 4 * requests)
    slots, lengths = index(requests), index(requests)
    for own, count in zip(widths, members, strict=True):
        drafts.cut_drafts(chances(count, own), chances(12), chances(10), index(count), 0.1)
    parts = [(index(count), drafted(count, own)) for count, own in zip(members, widths, strict=True)]
    laid = drafts.lay_drafts(parts, slots, lengths, width, width, 1 << 17, text())
    copied, columns = drafted(requests, 16), 2 * widest + 1
    silent = index(requests, VOICES)
    from_host = HostDrafts(
        index(requests, VOICES, columns), chances(requests, VOICES, columns), silent, silent
    )
    beside = (
        rng.choice((None, drafted(requests, rng.randint(1, widest)))),
        rng.choice((None, from_host)),
        rng.choice((None, copied)),
        index(requests),
        0.1,
        rng.randint(1, 4 * requests),
    )
    chosen = drafts.choose_drafts(laid, slots, lengths, text(), None, *beside)
    prepared = (index(requests), chosen.tokens, chosen.widths, lengths, slots, slot_table())
    packed = block.prepare_mixed_block(*prepared, rows, 0)
    kept = (slots, index(257, 8), text())
    ids = packed.input_ids
    block.accept_and_commit(ids, ids, packed.qo_indptr, lengths, width + 1, 0, *kept)
    run_claim(requests)
    # What all drafters claimed, of which one takes its own: an odd number of them starts at an odd place.
    begins, ends = (index(2 * requests)[requests:] for _ in range(2))
    for chunks, hidden, starts in DRAFTERS:
        backlog.unpark(RINGS, slots, begins, ends, slot_table(), rng.randint(1, rows), chunks, hidden)
        members = None if rng.random() < 0.5 else index(rng.randint(1, requests))
        own = chunks if starts else ()
        passes.draft_inputs(RINGS, members, slots, lengths, slots, slots, own, hidden)
    for behind in (False, True):
        run_copies(requests, behind=behind)


def compilations(batches: int, most_requests: int = 256, widest: int = 16) -> dict[str, int]:
    """How many kernels Triton would compile for random batches behind `warm_up`, by name; 0 of what that launches."""
    rng = random.Random(0)
    asked = [mock.patch(f"whiflash_kernels.{name}.backend_for", return_value="triton") for name in ASKED]
    with keying_instead_of_launching(90) as keys:
        with ExitStack() as stack:
            for patched in asked:
                stack.enter_context(patched)
            served = Served(
                text(),
                slot_table(),
                index(257, 8),
                RINGS,
                index(2, 257),
                most_requests,
                widths={7, widest},
                voices=(VOICES, 2 * widest + 1),
                vocabulary=1 << 17,
                bins=11,
                columns=DRAFTERS,
                copied=(24, 8),
            )
            warm_up(served)
        known = set(keys)
        for _ in range(batches):
            run_round(rng, most_requests, widest)
    found = dict.fromkeys((key[0] for key in known), 0) | Counter(key[0] for key in keys - known)
    return dict(sorted(found.items()))


def resources(cubin: bytes) -> dict[str, int]:
    """What ``cuobjdump -res-usage`` says of the one function in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", output)}


def compile_everything() -> list[Compiled]:
    """Compile the launches of every case for every architecture."""
    report = []
    for capability in CAPABILITIES:
        for case, run in CASES.items():
            with compiling_instead_of_launching(capability) as compiled:
                run()
            for kernel in compiled:
                used, warps = resources(kernel.asm["cubin"]), kernel.metadata.num_warps
                # What Hopper and later reserve of shared memory is the driver's, which is reckoned with in any case.
                shared = kernel.metadata.shared
                report.append(
                    Compiled(
                        kernel=kernel.metadata.name,
                        case=case,
                        target=f"sm_{capability}",
                        warps=warps,
                        registers=used["REG"],
                        stack_bytes=used["STACK"],
                        local_bytes=used["LOCAL"],
                        shared_bytes=shared,
                        programs_at_once=programs_at_once(capability, warps, used["REG"], shared),
                    )
                )
    return report


def markdown(report: list[Compiled], origin: dict[str, str]) -> str:
    """One row for each kernel and case, registers and shared memory by architecture."""
    targets = [f"sm_{capability}" for capability in CAPABILITIES]
    lines = [
        "# Kernels compiled ahead of time",
        "",
        "Written by `python kernels/bench/aot.py --write`; no GPU is involved. Registers a thread / shared bytes / "
        "programs that a multiprocessor holds at once.",
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
        found = [by_target[t] for t in targets]
        cells = [f"{each.registers} / {each.shared_bytes} / {each.programs_at_once}" for each in found]
        stack = max(entry.stack_bytes for entry in by_target.values())
        lines.append(f"| {case} | `{kernel}` | {warps} | {' | '.join(cells)} | {stack} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write results/aot.json and results/aot.md")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--batches", type=int, help="count what so many random batches compile, and nothing else"
    )
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
    unfit = [
        entry for entry in report if entry.stack_bytes or entry.local_bytes or not entry.programs_at_once
    ]
    if missing or unfit:
        print(f"not compiled: {sorted(missing)}; spilled, or too large: {unfit}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
