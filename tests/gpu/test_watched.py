"""The watchers of a card, on the phantom card."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from card import phantom
from streams import Streams
from torch.overrides import handle_torch_function, has_torch_function
from watched import Pageable, Waits
from watching import Functions

INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import torch.nn.functional as F
import sgl_kernel as ours
torch.manual_seed(0)
x, y, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
norm = F.rms_norm(x, (24,), weight, 1e-6)
torch.testing.assert_close(ours.rmsnorm(x, weight), norm)
torch.testing.assert_close(ours.rmsnorm(x[:, :12], weight[:12]), F.rms_norm(x[:, :12], (12,), weight[:12], 1e-6))
torch.testing.assert_close(ours.gemma_rmsnorm(x, weight), F.rms_norm(x, (24,), 1 + weight, 1e-6))
total, into = x + y, x.clone()
ours.fused_add_rmsnorm(into, y, weight)
torch.testing.assert_close(y, total)
torch.testing.assert_close(into, F.rms_norm(total, (24,), weight, 1e-6))
torch.testing.assert_close(ours.silu_and_mul(x), F.silu(x[:, :12]) * x[:, 12:])
packed, table, at = torch.randn(5, 4, 8), torch.randn(9, 6), torch.tensor([3, 0, 8, 1, 1])
q, k, (cosine, sine) = packed[:, :3].clone(), packed[:, 3:].clone(), table[at].unsqueeze(1).chunk(2, -1)
ours.rotate(at, packed[:, :3], packed[:, 3:], table, is_neox=True)
for old, new in ((q, packed[:, :3]), (k, packed[:, 3:])):
    a, b, rest = old.split((3, 3, 2), -1)
    torch.testing.assert_close(new, torch.cat((a * cosine - b * sine, b * cosine + a * sine, rest), -1))
rows, pools = torch.randn(3, 2, 12), torch.zeros(2, 7, 12)
ours.store(rows[:, 0], rows[:, 1], *pools, torch.tensor([6, 2, 0]))
torch.testing.assert_close(pools[:, [6, 2, 0]], rows.transpose(0, 1))
assert pools[:, [1, 3, 4, 5]].count_nonzero() == 0
"""


def test_copies_from_memory_that_is_not_pinned_are_seen_though_they_do_not_wait() -> None:
    with phantom(), Pageable() as copies:
        pinned = torch.ones(3).pin_memory()
        on_card = pinned.to("cuda", non_blocking=True)
        on_card.copy_(pinned, non_blocking=True)
        on_card.to(torch.float64)
        assert not copies.seen
        torch.ones(3).to("cuda", non_blocking=True)
        on_card.copy_(torch.ones(3), non_blocking=True)
        torch.ones(3).cuda(non_blocking=True)
        on_card[1:] = torch.ones(2)
        assert copies.seen.total() == 4


def read(tensor: Any) -> None:
    """An operator that waits: the innermost frame of Python is the mode's, as of torch's own operators on a card."""
    if has_torch_function((tensor,)):
        return handle_torch_function(read, (tensor,), tensor)
    warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=2)
    return None


def test_a_wait_is_counted_once_and_by_the_line_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: warnings.warn(notice, stacklevel=1))
    waits, ours = Waits("cuda"), ("whiflash_sglang/round/draft.py", "whiflash_sglang/device/transfers.py")
    with waits():
        for path in (*ours, "sglang/srt/managers/scheduler.py", "sglang/kernels/spec.py"):
            exec(compile("read(torch.ones(1))", f"/site/{path}", "exec"), {"read": read, "torch": torch})
    assert waits.found == {f"{path}:1": 1 for path in ours}


def test_what_stands_in_for_sglangs_operators_computes_the_same() -> None:
    path = str(Path(__file__).parent / "stand_ins")
    code = f"import sys; sys.path.insert(0, {path!r})\n{INTERPRETED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("read", [lambda t: t.tolist(), lambda t: bool(t[0]), lambda t: t[t > 1]])
def test_the_detector_sees_a_planted_read(read: Any) -> None:
    tensor, world = torch.arange(3), Streams()
    with Functions(world):
        tensor + tensor[1:2]
        torch.where(tensor > 1, tensor, 0)
        assert not world.stalls
        read(tensor)
    assert world.stalls


def test_the_detector_sees_a_planted_upload() -> None:
    device, there, world = torch.device("cpu"), torch.empty(2, 3), Streams()
    with Functions(world):
        torch.empty(3, pin_memory=False).to(device)
        there[0] = 1
        there[:, 1] = 2
        assert (world.uploads.total(), world.pageable.total()) == (1, 0)
        torch.tensor([1, 2], device=device)
        there[0, -1] = 3
        there[1][2] = 4
    assert (world.uploads.total(), world.pageable.total(), world.stalls.total()) == (1, 3, 0)
