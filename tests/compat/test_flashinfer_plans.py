"""FlashInfer's own planner, on a CPU: what a captured launch keeps of its plan is the same for every later one.

FlashInfer plans on the host, in C++ (`scheduler.cuh`), which is compiled here with nothing of CUDA but three functions:
what the card is like, and a copy. So a verification that is replayed with other widths than it was captured with finds
its plan where it looks for it, and as many blocks as there are.
"""

import ctypes
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_wrapper import SMS, PagedWrapper
from sglang.kernels.ops.speculative.ragged_verify_kernels import pad_verify_lens_to_bucket
from sglang.srt.speculative.ragged_verify import build_capture_verify_lens

from whiflash_sglang.compat.forward.graphs import row_buckets, spare_slots

REQUESTS, WIDEST = 48, 17
BUCKETS = row_buckets(REQUESTS * WIDEST)
SLOTS = REQUESTS + spare_slots(REQUESTS, WIDEST)
PACKAGES = Path(sysconfig.get_paths()["purelib"])
CUDA = PACKAGES / "triton" / "backends" / "nvidia" / "include"
INTS = 1 << 21

SOURCE = """
#include <cstring>
#include "attention/scheduler.cuh"

extern "C" {
int multiprocessors = 132;
const size_t workspace = size_t(384) << 20;  // as SGLang has it (SGLANG_FLASHINFER_WORKSPACE_SIZE)
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors
         : attribute == cudaDevAttrComputeCapabilityMajor ? 9
         : attribute == cudaDevAttrComputeCapabilityMinor ? 0 : 232448;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

// Both take offsets of rows and keys, and say where in `ints` the plan lies; -1 where FlashInfer refuses.
int plan_prefill(int* rows, int* keys, int most, int requests, int heads, int kv_heads, int size, int page,
                 char* pinned, char* ints, size_t bytes, int64_t* info) try {
  flashinfer::PrefillPlanInfo plan;
  void* floats = reinterpret_cast<void*>(1 << 20);
  auto status = flashinfer::PrefillPlan<int>(
      floats, workspace, ints, pinned, bytes, plan, rows, keys, most, requests, heads, kv_heads, size, size, page,
      true, 2, -1, -1, false, 0, 0, nullptr);
  auto found = plan.ToVector();
  std::copy(found.begin(), found.end(), info);
  return status == cudaSuccess ? found.size() : -1;
} catch (...) { return -1; }

int plan_mla(int* rows, int* keys, int* lengths, int requests, int heads, char* pinned, char* ints, size_t bytes,
             int64_t* info) try {
  flashinfer::MLAPlanInfo plan;
  size_t staged;
  void* floats = reinterpret_cast<void*>(1 << 20);
  auto status = flashinfer::MLAPlan<int>(
      floats, workspace, ints, pinned, bytes, plan, staged, rows, keys, lengths, requests, heads, 512, true,
      nullptr);
  auto found = plan.ToVector();
  std::copy(found.begin(), found.end(), info);
  return status == cudaSuccess ? found.size() : -1;
} catch (...) { return -1; }
}
"""
HEADERS = {
    "pos_enc.cuh": """
        #include <algorithm>
        #include "utils.cuh"
        using std::max, std::min;  // which CUDA has in no namespace
        namespace flashinfer { enum class PosEncodingMode { kNone, kRoPELlama, kALiBi }; }
    """,
    "cuda_bf16.h": "struct __nv_bfloat16;",
    "cuda_fp16.h": "struct __half;",
    "cuda_fp8.h": "struct __nv_fp8_e4m3; struct __nv_fp8_e5m2;",
}
"""In the place of headers that are all device code, of which the planner has names."""


class Planner:
    """FlashInfer's, for one model on one card. `info` is what a launch keeps, `ints` what it reads from memory."""

    def __init__(self, library: ctypes.CDLL, heads: int, kv_heads: int, size: int, page: int = 1) -> None:
        self._library, self.model = library, (heads, kv_heads, size, page)
        self._pinned = ctypes.create_string_buffer(INTS)
        self.ints, self._info = ctypes.create_string_buffer(INTS), (ctypes.c_int64 * 32)()

    def paged(self, rows: Sequence[int], keys: Sequence[int], most: int) -> list[int]:
        """Offsets of rows and keys, and the rows of the capture."""
        memory = (self._pinned, self.ints, ctypes.c_size_t(INTS), self._info)
        count = self._library.plan_prefill(ints(rows), ints(keys), most, len(rows) - 1, *self.model, *memory)
        assert count == 15
        return list(self._info[:count])

    def latent(self, rows: Sequence[int], keys: Sequence[int]) -> list[int]:
        lengths = [b - a for a, b in pairwise(keys)]
        memory = (self._pinned, self.ints, ctypes.c_size_t(INTS), self._info)
        arrays = (ints(rows), ints(keys), ints(lengths))
        count = self._library.plan_mla(*arrays, len(lengths), self.model[0], *memory)
        assert count == 18
        return list(self._info[:count])

    def work(self, info: Sequence[int]) -> list[tuple[int, ...]]:
        """Request, tile of queries and chunk of keys, of every block that has some."""
        blocks, offsets, valid_at = info[0], info[4:7], info[12]
        valid = self.ints.raw[valid_at : valid_at + blocks]
        columns = [(ctypes.c_int * blocks).from_buffer_copy(self.ints.raw, at) for at in offsets]
        return [item for item, is_valid in zip(zip(*columns, strict=True), valid, strict=True) if is_valid]

    def chunk(self, info: Sequence[int]) -> int:
        return ctypes.c_int.from_buffer_copy(self.ints.raw, info[9]).value


def ints(values: Sequence[int]) -> Any:
    return (ctypes.c_int * len(values))(*values)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not (compiler := shutil.which("g++")) or not find_spec("flashinfer") or not CUDA.is_dir():
        pytest.skip("needs g++, FlashInfer's headers and Triton's of CUDA")
    headers = PACKAGES / "flashinfer" / "data" / "include" / "flashinfer"
    root = tmp_path_factory.mktemp("planner")
    (root / "attention").mkdir()
    for name in ("attention/scheduler.cuh", "attention/heap.h", "allocator.h", "exception.h", "utils.cuh"):
        (root / name).symlink_to(headers / name)
    for name, text in HEADERS.items():
        (root / name).write_text(text)
    (root / "plan.cpp").write_text(SOURCE)
    made = root / "plan.so"
    command = [
        compiler,
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-w",
        "-DNDEBUG",
        "-Wl,-Bsymbolic",
        f"-I{root}",
        f"-I{CUDA}",
    ]
    found = subprocess.run(
        [*command, str(root / "plan.cpp"), "-o", str(made)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return ctypes.CDLL(str(made))


def captured(bucket: int) -> tuple[list[int], list[int]]:
    """Offsets of rows and keys that a graph of so many rows is captured with."""
    slots = min(bucket, SLOTS)
    widths = build_capture_verify_lens(num_tokens=bucket, num_slots=slots, num_draft_tokens=WIDEST)
    return offsets(widths), offsets([width + 1 for width in widths])


def replays(bucket: int, longest: int, times: int = 12) -> Iterator[tuple[list[int], list[int]]]:
    """The same of batches that replay it: any number of requests, of any widths, and the rows that are nobody's."""
    generator = torch.Generator().manual_seed(bucket)

    def below(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    lower, slots = max((size for size in BUCKETS if size < bucket), default=0), min(bucket, SLOTS)
    for _ in range(times):
        total = lower + 1 + below(bucket - lower)
        fewest = -(-total // WIDEST)
        widths = [1] * (fewest + below(min(total, REQUESTS) - fewest + 1))
        while sum(widths) < total:
            at = below(len(widths))
            widths[at] += min(below(WIDEST - widths[at] + 1), total - sum(widths))
        lens = torch.tensor(widths, dtype=torch.int32)
        padded = pad_verify_lens_to_bucket(
            verify_lens=lens, graph_num_tokens=bucket, bs=len(widths), padded_bs=slots
        ).tolist()
        contexts = [below(longest) + 1 for _ in widths] + [1] * (slots - len(widths))
        yield offsets(padded), offsets([n + m for n, m in zip(contexts, padded, strict=True)])


def offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(32, 8, 128), (28, 4, 128), (16, 16, 64), (64, 8, 256)]
)
def test_what_a_launch_keeps_of_its_plan_is_the_captures(
    library: ctypes.CDLL, heads: int, kv_heads: int, size: int
) -> None:
    """And every row meets every key of its request once, wherever the keys are cut."""
    planner, kept = Planner(library, heads, kv_heads, size), set()
    for bucket in BUCKETS:
        first = planner.paged(*captured(bucket), bucket)
        kept.add(tuple(first))
        for rows, keys in replays(bucket, longest=60_000):
            info = planner.paged(rows, keys, bucket)
            assert info == first
            tile, chunk = info[3], planner.chunk(info)
            lengths = zip(rows, rows[1:], keys, keys[1:], strict=False)
            assert sorted(planner.work(info)) == [
                (request, tile_of, part)
                for request, (a, b, c, d) in enumerate(lengths)
                for tile_of in range(-(-(b - a) * (heads // kv_heads) // tile))
                for part in range(-(-(d - c) // chunk))
            ]
    assert len(kept) == len(BUCKETS)


@pytest.mark.parametrize("heads", [16, 128])
def test_of_latent_attention_too_where_all_rows_are_somebodys(library: ctypes.CDLL, heads: int) -> None:
    """It goes by the rows of a request on average, so rows that no request had would change the launch."""
    planner, changed = Planner(library, heads, 1, 512), 0
    for bucket in BUCKETS:
        first = planner.latent(*captured(bucket))
        for rows, keys in replays(bucket, longest=20_000, times=4):
            assert planner.latent(rows, keys) == first
            fewer = [min(row, rows[-1] // 2) for row in rows]
            changed += planner.latent(fewer, keys) != first
    assert changed


def test_the_stand_in_plans_as_flashinfer_does(library: ctypes.CDLL) -> None:
    """`tests/paged_wrapper.py`, with which whole rounds are replayed. Pages of 16 make FlashInfer's chunks as short."""
    ctypes.c_int.in_dll(library, "multiprocessors").value = SMS
    try:
        planner = Planner(library, 4, 2, 16, page=16)
        for bucket in (size for size in BUCKETS if size <= 96):
            first, slots = captured(bucket), min(bucket, SLOTS)
            own = wrapper(slots)
            for rows, keys in (first, *replays(bucket, longest=90, times=6)):
                own.begin_forward(
                    *(torch.tensor(a) for a in (rows, keys, range(keys[-1]))), torch.ones(slots), 4, 2, 16, 1
                )
                info, plan = planner.paged(rows, keys, bucket), own._int_workspace_buffer
                blocks = own.info.blocks
                assert (info[0], info[3]) == (blocks, own.info.tile)
                valid = int(plan[3 * blocks : 4 * blocks].sum())
                columns = plan[: 3 * blocks].view(3, blocks)[:, :valid]
                assert [tuple(item) for item in columns.T.tolist()] == planner.work(info)
                assert int(plan[4 * blocks]) * 16 == planner.chunk(info)
    finally:
        ctypes.c_int.in_dll(library, "multiprocessors").value = 132


def wrapper(requests: int) -> PagedWrapper:
    def room(count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32)

    return PagedWrapper(
        torch.empty(0),
        "NHD",
        use_cuda_graph=True,
        backend="fa2",
        qo_indptr_buf=room(requests + 1),
        paged_kv_indptr_buf=room(requests + 1),
        paged_kv_indices_buf=room(1 << 16),
        paged_kv_last_page_len_buf=room(requests),
    )
