"""Recorded features and tokens, played into both drafters along any history of a request's life."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target

from whiflash_sglang.arms.block import DFlashArm
from whiflash_sglang.arms.chain import Eagle3Arm
from whiflash_sglang.arms.length import CALIBRATION
from whiflash_sglang.arms.paged import PagedArm
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.device.capture import Recorder
from whiflash_sglang.formats.dflash.dflash import DFlashDrafter
from whiflash_sglang.formats.eagle3 import Eagle3Drafter
from whiflash_sglang.formats.table import read_draft
from whiflash_sglang.prices.costs import FULL_LENGTH
from whiflash_sglang.records.core import DraftBatch
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_train.origin import for_training
from whiflash_train.target import TargetModel

torch.set_num_threads(1)

ROWS, CONTEXT, RING, VOCAB = 3, 176, 32, 256
SLOTS = 2 * ROWS * CONTEXT + 1
"""Twice what the rows can hold, so that slots can be remapped to free ones, and the padding's."""


@dataclass(frozen=True)
class Arms:
    """The two drafters; width: columns of one captured row."""

    by_name: dict[str, PagedArm]
    width: int

    def full_pass(self, features: torch.Tensor, tokens: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """KV of positions 0..n-1 in one go: per arm k and v [layers, n, Hkv, D]. tokens: [n + 1]."""
        n = len(features)
        slots = torch.arange(n)
        requests = torch.zeros_like(slots)
        rows = FeatureRows(features, slots, slots, tokens[1 : n + 1], requests, slots[None].int(), [n])
        found = {}
        for name, arm in self.by_name.items():
            kept = arm.kv
            arm.allocate(n)
            arm.catch_up(rows.of(arm.features))
            found[name] = (arm.kv.k, arm.kv.v)
            arm.kv = kept
        return found


def load_arms(root: Path, eagle3_layers: int = 1) -> Arms:
    """Write tiny checkpoints under `root` and load them."""
    target = tiny_target(root / "target")
    eagle3 = tiny_eagle3(root / "eagle3", target, num_layers=eagle3_layers)
    dflash = tiny_dflash(root / "dflash", target)
    model = TargetModel(target, device=torch.device("cpu"), dtype=torch.float32)
    options = for_training(model)
    for_eagle, for_dflash = (target_layers(read_draft(path), model.num_layers) for path in (eagle3, dflash))
    captured = tuple(sorted({*for_eagle, *for_dflash}))
    by_name: dict[str, PagedArm] = {
        "ar": Eagle3Arm(Eagle3Drafter.load(eagle3, **options), captured, for_eagle, 5, 1024),
        "diffusion": DFlashArm(DFlashDrafter.load(dflash, **options), captured, for_dflash, 8, 1024),
    }
    for arm in by_name.values():
        arm.model.requires_grad_(False)
        arm.allocate(SLOTS)
    return Arms(by_name, len(captured) * model.hidden_size)


class Replay:
    """`ROWS` requests, each following its own recording, as the worker would drive them.

    Request i is in row i + 1: row 0 and slot 0 are the padding's.
    """

    def __init__(self, arms: Arms, seed: int, capacity: int = RING, late: int = 0) -> None:
        """late: the host's bounds on a length are off by up to so many tokens, as behind rounds that still run."""
        self.arms, self.late = arms, late
        self.random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.sync = DraftSync(arms.by_name, capacity, arms.width, torch.float32, Quarantine(arms.by_name, alone=False))
        for arm in arms.by_name.values():
            arm.kv.k.fill_(torch.nan)  # whatever is read without having been written shows
            arm.kv.v.fill_(torch.nan)
        free = list(range(1, SLOTS))
        self.random.shuffle(free)
        slots = [0] * CONTEXT + free[: ROWS * CONTEXT]
        self.table = torch.tensor(slots, dtype=torch.int32).view(ROWS + 1, CONTEXT)
        self.free = free[ROWS * CONTEXT :]
        self.sync.allocate(self.table)
        self.lengths = [0] * ROWS
        self.features = torch.empty(ROWS, CONTEXT, arms.width)
        self.tokens = torch.empty(ROWS, CONTEXT + 1, dtype=torch.int64)
        for row in range(ROWS):
            self.begin(row)

    def capture(self, recorder: Recorder) -> None:
        """From now on passes are replayed."""
        inputs = DraftBatch.of_padding(ROWS, self.features, self.table, CALIBRATION)
        for arm in self.arms.by_name.values():
            arm.capture(recorder, inputs)
        self.sync.capture(recorder, ROWS, ROWS * max(arm.max_drafts + 1 for arm in self.arms.by_name.values()))

    def begin(self, row: int) -> None:
        """A new request: its recording is drawn, its prompt is prefilled, sometimes in two chunks."""
        self.features[row] = torch.randn(CONTEXT, self.arms.width, generator=self._generator)
        self.tokens[row] = torch.randint(VOCAB, (CONTEXT + 1,), generator=self._generator)
        self.prefill(row, 0, self.random.randint(1, 24))

    def prefill(self, row: int, hit: int, length: int) -> None:
        """Prefill [hit, length) of a row's recording; [0, hit) comes out of the tree."""
        cut = self.random.randint(hit, length)
        for begin, end in ((hit, cut), (cut, length)):
            if begin < end:
                positions = torch.arange(begin, end)
                rows = FeatureRows(
                    self.features[row, begin:end],
                    positions,
                    self.table[row + 1, begin:end].long(),
                    self.tokens[row, begin + 1 : end + 1],
                    runs=[end - begin],
                )
                last = torch.tensor([end - begin - 1])
                self.sync.prefill(rows, [row + 1], [end], torch.tensor([row + 1]), last)
        self.lengths[row] = length

    def lag(self, row: int) -> int:
        """Tokens of a row that are parked for the drafter that lags most."""
        return self.lengths[row] - min(self.sync.watermarks.synced(row + 1, arm) for arm in self.arms.by_name)

    def round(self, routes: Sequence[str], accepts: Sequence[int]) -> None:
        """One round of all rows: catch up, draft for real (provisional writes included), commit and park."""
        arms = self.arms.by_name
        widths = [arms[route].max_drafts + 1 if route in arms else 1 for route in routes]
        rows = list(range(1, ROWS + 1))
        least = [max(n - self.random.randint(0, self.late), 1) for n in self.lengths]
        most = [n + self.random.randint(0, self.late) for n in self.lengths]
        due = self.sync.due(rows, least, most, routes, widths)
        flags = torch.tensor(self.sync.flags(due, ROWS))
        self.sync.catch_up(due, flags, torch.tensor(rows), torch.tensor(self.lengths))
        for row, n in enumerate(self.lengths):
            assert self.lag(row) <= self.sync.watermarks.capacity - widths[row]
            one, at = torch.tensor([row + 1]), torch.tensor([n])
            *_, tail, _ = self.sync.rings.inputs(None, one, at, one, one, one, wanted=None, tail=True)
            assert torch.equal(tail[0], self.features[row, n - 1]), "feature n-1 did not survive"
        for name, arm in arms.items():
            members = [row for row in range(ROWS) if routes[row] == name]
            if members:
                drafts = arm.draft(self.draft_batch(members, arm))
                assert not drafts.tokens.isnan().any()
        counts = [min(accept, width) for accept, width in zip(accepts, widths, strict=True)]
        # The verification's packed rows: rejected drafts' features lie between the committed ones.
        packed, following, starts = [], [], []
        for row, (n, width, count) in enumerate(zip(self.lengths, widths, counts, strict=True)):
            starts.append(sum(len(p) for p in packed))
            rejected = width - count
            packed.append(torch.cat([self.features[row, n : n + count], torch.full((rejected, self.arms.width), 7.0)]))
            following.append(
                torch.cat([self.tokens[row, n + 1 : n + count + 1], torch.zeros(rejected, dtype=torch.int64)])
            )
        self.sync.rings.park(
            torch.cat(packed),
            torch.cat(following),
            torch.tensor(rows),
            torch.tensor(self.lengths),
            torch.tensor(counts),
            torch.tensor(starts),
            widest=max(counts),
        )
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]

    def draft_batch(self, members: Sequence[int], arm: PagedArm) -> DraftBatch:
        rows = torch.tensor(members) + 1
        starts = torch.tensor([self.lengths[row] for row in members])
        limits = [self.random.randint(1, arm.max_drafts) for _ in members]
        bonus, caps, reads = self.tokens[rows - 1, starts], torch.tensor(limits), arm.tail_width > 0
        place = arm.place(len(members))
        calibration = torch.tensor(arm.calibration(members, FULL_LENGTH))
        rows, starts, bonus, caps, tail, calibration = self.sync.rings.inputs(
            None, rows, starts, bonus, caps, calibration, wanted=arm.features, tail=reads, into=place
        )
        longest, ids = int(starts.max()), rows.tolist()
        return DraftBatch(rows, starts, bonus, tail, self.table, longest, caps, limits, ids, calibration)

    def finish(self, row: int) -> None:
        """The request ends: its backlog is flushed, since its slots may enter the tree; another one begins."""
        self.check(row)
        self.sync.forget(row + 1)
        self.begin(row)

    def abort(self, row: int) -> None:
        """The row is dropped with whatever it had parked."""
        self.sync.forget(row + 1)
        self.begin(row)

    def retract(self, row: int) -> None:
        """The request loses its slots and is prefilled again, a part of it out of the tree."""
        length = self.lengths[row]
        self.sync.forget(row + 1)
        hit = self.random.randint(0, length - 1)
        full = self.arms.full_pass(self.features[row, :length], self.tokens[row])
        slots = self.table[row + 1, :hit].long()
        for name, arm in self.arms.by_name.items():
            _write(arm, slots, full[name][0][:, :hit], full[name][1][:, :hit])
        self.prefill(row, hit, length)

    def remap(self, row: int) -> None:
        """The tree replaces the request's slots by others that hold the same; parked positions have none yet."""
        old = self.table[row + 1].long()
        new = torch.tensor([self.free.pop(0) for _ in range(CONTEXT)])
        for name, arm in self.arms.by_name.items():
            marks = self.sync.watermarks
            done = int(marks.device[marks.arms.index(name), row + 1])
            _write(arm, new[:done], arm.kv.k[:, old[:done]], arm.kv.v[:, old[:done]])
        self.table[row + 1] = new.int()
        self.free += old.tolist()

    def check(self, row: int) -> None:
        """Flush the row and compare it with one full pass: watermarks, slots and KV."""
        n = self.lengths[row]
        self.sync.leave(row + 1, n)
        self.sync.flush()
        slots = self.table[row + 1, :n].long()
        for name, (k, v) in self.arms.full_pass(self.features[row, :n], self.tokens[row]).items():
            assert self.sync.watermarks.synced(row + 1, name) == n
            kv = self.arms.by_name[name].kv
            for found, wanted in ((kv.k[:, slots], k), (kv.v[:, slots], v)):
                error = float((found - wanted).abs().nan_to_num(torch.inf).max())
                assert error <= 1e-5 * float(wanted.abs().max()), f"KV of {name} is off by {error:.1e}"


def _write(arm: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Store k, v `[layers, N, Hkv, D]` of all layers at `slots`, as whoever owned them before would have."""
    arm.kv.k[:, slots] = k
    arm.kv.v[:, slots] = v
