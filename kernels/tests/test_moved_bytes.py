"""Kernels move what they must, and little beside it."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_backends import BACKENDS, running

BENCH = str(Path(__file__).parents[1] / "bench")

MOST = {
    "accept_and_commit": 3.5,
    "choose_drafts": 1.3,
    "claim_backlogs": 1.9,
    "cut_drafts": 7.4,
    "draft_attention": 2.6,
    "draft_inputs": 1.2,
    "lay_drafts": 1.9,
    "park": 1.1,
    "pass_rows": 1.4,
    "prepare_mixed_block": 3.1,
    "propose_copies": 4.0,
    "router_mlp": 1.2,
    "routing_stats": 1.1,
    "unpark": 1.2,
}
"""Bytes moved over the least, by op, for shapes whose rows are few sectors. Ratchets: lower them only."""


@pytest.fixture
def bench() -> Iterator[None]:
    sys.path.insert(0, BENCH)
    yield
    sys.path.remove(BENCH)


@pytest.mark.skipif("triton" not in BACKENDS or torch.cuda.is_available(), reason="needs the interpreter")
@pytest.mark.usefixtures("bench")
def test_triton_programs_move_little_beside_what_they_must() -> None:
    import moved_bytes

    sizes = {"hidden": 256, "heads": 8, "kv_heads": 2, "dim": 64, "vocab": 4096, "router_units": 32}
    shape = replace(moved_bytes.SHAPES["smollm2-135m"], **sizes)
    found: dict[str, float] = {}
    with running("triton"):
        few = moved_bytes.Sizes(batches=(2, 4), backlogs=(4,), context=256)
        for case, moved in moved_bytes.counted(moved_bytes.Bench(shape, torch.device("cpu"), 4, few)):
            found[case.op] = max(found.get(case.op, 0.0), moved.moved / case.moved_bytes)
    print({op: round(ratio, 2) for op, ratio in sorted(found.items())})
    assert found.keys() == MOST.keys()
    assert {op: ratio for op, ratio in found.items() if ratio > MOST[op]} == {}
