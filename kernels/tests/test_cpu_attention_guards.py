"""Attention compiled for a CPU: layouts other than a pool's, what it keeps, what it asks of threads."""

import os
import re
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import Tensor
from whiflash_kernels.cpu.paged_attention import CompiledAttention, compiled_attention
from whiflash_kernels.reference.paged_attention import PagedAttentionPlan

SLOTS, KV_HEADS, HEADS, SIZE = 256, 2, 4, 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp().parent / "compiled"


@pytest.fixture(scope="module")
def kernel(directory: Path) -> CompiledAttention:
    try:
        return compiled_attention(directory)
    except OSError as error:
        pytest.skip(str(error))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def slots_of(rows: int, entries: int) -> Tensor:
    return torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).view(rows, entries).int()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_entries_of_the_slot_table_may_lie_apart(kernel: CompiledAttention, dtype: torch.dtype) -> None:
    table = slots_of(64, 4).to(dtype).t()
    q, k, v = normal(3, HEADS, SIZE), normal(SLOTS, KV_HEADS, SIZE), normal(SLOTS, KV_HEADS, SIZE)
    apart = kernel.plan(table, [1, 2], [50, 40], causal=True).run(q, k, v, 0.2)
    together = kernel.plan(table.contiguous(), [1, 2], [50, 40], causal=True).run(q, k, v, 0.2)
    assert torch.equal(apart, together)


@pytest.mark.parametrize(("rows", "entries"), [(1, 50), (1, 250), (5, 250), (70, 250)])
def test_what_lies_before_every_window_is_not_read(kernel: CompiledAttention, rows: int, entries: int) -> None:
    window, table = 10, slots_of(1, SLOTS)
    q, k, v = normal(rows, HEADS, SIZE), normal(SLOTS, KV_HEADS, SIZE), normal(SLOTS, KV_HEADS, SIZE)
    plan = kernel.plan(table, [rows], [entries], causal=True, window=window)
    expected = plan.run(q, k, v, 0.2)
    before = table[0, : entries - rows - window].long()
    k[before] = v[before] = float("nan")
    assert torch.equal(plan.run(q, k, v, 0.2), expected)


@pytest.mark.parametrize("entry", [0, 7, 70])
def test_what_is_no_number_is_seen(kernel: CompiledAttention, entry: int) -> None:
    """A key that is none, of a value that is one, must not be passed over: every entry weighs."""
    table, entries = slots_of(1, SLOTS), 100
    q, k, v = normal(1, HEADS, SIZE), normal(SLOTS, KV_HEADS, SIZE), normal(SLOTS, KV_HEADS, SIZE)
    k[table[0, entry].long(), 0, 3] = float("nan")
    found = kernel.plan(table, [1], [entries], causal=True).run(q, k, v, 0.2)
    plain = PagedAttentionPlan.build(table, [1], [entries], causal=True).run(q, k, v, 0.2)
    assert torch.equal(found.isnan(), plain.isnan())
    assert found[:, :2].isnan().all()


@pytest.mark.parametrize(
    ("rows", "heads", "size", "sinks"),
    [(2, 4, 32, None), (4, 4, 32, None), (3, 4, 64, None), (3, 3, 32, None), (3, 1, 32, None), (3, 4, 32, 2)],
    ids=["fewer rows", "more rows", "wider", "a head over", "fewer heads", "fewer sinks"],
)
def test_shapes_that_do_not_fit(kernel: CompiledAttention, rows: int, heads: int, size: int, sinks: int | None) -> None:
    plan = kernel.plan(slots_of(1, SLOTS), [3], [10], causal=True)
    k = normal(SLOTS, KV_HEADS, SIZE)
    with pytest.raises(ValueError, match="do not fit"):
        plan.run(normal(rows, heads, size), k, k, 0.2, None if sinks is None else torch.ones(sinks))


def test_a_thread_of_pythons_may_be_the_first_to_ask(directory: Path) -> None:
    """Torch sets how many threads a new thread uses when it is first called there."""
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom threading import Thread\n"
        "from whiflash_kernels.cpu.paged_attention import compiled_attention\n"
        "torch.set_num_threads(torch.get_num_threads() + 2)\n"
        "first = Thread(target=compiled_attention, args=[Path(sys.argv[1])])\nfirst.start(); first.join()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program, str(directory)]
    error = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    if "no C++ compiler" in error:
        pytest.skip("no C++ compiler here")
    assert error == ""


def test_threads_of_pythons_run_at_once(kernel: CompiledAttention) -> None:
    table, q = slots_of(1, SLOTS).repeat(1, 6), normal(9, HEADS, SIZE)
    k = v = normal(SLOTS, KV_HEADS, SIZE)
    plans = [kernel.plan(table, [9], [n], causal=True) for n in (90, 700, 1500)]
    expected = [plan.run(q, k, v, 0.2) for plan in plans]
    found: list[list[Tensor]] = []

    def work() -> None:
        found.append([plan.run(q, k, v, 0.2) for _ in range(5) for plan in plans])

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, 5 * expected, strict=True))


def test_room_for_many_chunks_is_given_back(kernel: CompiledAttention) -> None:
    """64 rows over a long context need 130 MB for the sums of chunks, which nothing after them does."""

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) // 1024

    if sys.platform != "linux":
        pytest.skip("no /proc here")
    entries, heads = 32768, 64
    k = normal(SLOTS, 1, 128)
    q, table = normal(64, heads, 128), torch.arange(entries, dtype=torch.int32)[None] % SLOTS
    plan = kernel.plan(table, [64], [entries], causal=True)
    before = resident()
    assert plan.run(q, k, k, 0.1).shape == q.shape
    assert resident() - before < 40
