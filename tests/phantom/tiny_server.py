"""Rounds on the phantom card: the package's own stages around a tiny target, its results learned a round late.

What is missing of a server is SGLang: a loop in this file stands for its scheduler, and the target's forward is a whole
pass over each request's text that runs as one launch.
"""

import itertools
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from card import Card
from streams import Streams
from tiny_models import tiny_dflash, tiny_eagle3, tiny_target
from torch.utils._python_dispatch import _disable_current_modes
from whiflash_kernels import MixedBlock, prepare_mixed_block

from whiflash_sglang import arms
from whiflash_sglang.cache.backlog import FeatureRows
from whiflash_sglang.cache.tokens import StopTable, TokenTable
from whiflash_sglang.checkpoints.fit import target_layers
from whiflash_sglang.checkpoints.manifest import Lookup
from whiflash_sglang.core import Round, Verified
from whiflash_sglang.device.clock import clock_of
from whiflash_sglang.device.transfers import Download, HostView, Upload
from whiflash_sglang.drafters.base import Drafter, of_text, widest_of
from whiflash_sglang.drafters.chain import Eagle3Arm
from whiflash_sglang.drafters.dflash import DFlashArm
from whiflash_sglang.drafters.lookup import LookupArm
from whiflash_sglang.models.dflash import DFlashDrafter
from whiflash_sglang.models.eagle3 import Eagle3Drafter
from whiflash_sglang.models.formats import read_draft
from whiflash_sglang.models.target import TargetModel
from whiflash_sglang.round.catch_up import DraftSync
from whiflash_sglang.round.draft import DraftStage
from whiflash_sglang.round.epilogue import Epilogue
from whiflash_sglang.round.learning import Learner, results_of
from whiflash_sglang.round.planning import Planner, rows_of
from whiflash_sglang.round.quarantine import Quarantine
from whiflash_sglang.round.sources import DraftSources
from whiflash_sglang.routing.controller import Controller
from whiflash_sglang.routing.policies import AutoPolicy
from whiflash_sglang.routing.tables import CostTables, LookedUpCosts, Sizes, Verifications
from whiflash_sglang.spans.hints import RequestHints
from whiflash_sglang.telemetry.round_clock import RoundClock
from whiflash_sglang.telemetry.tally import Tally

CUDA = torch.device("cuda", 0)
CONTEXT, RING, ROUTES = 160, 32, (arms.AR, arms.DIFFUSION, arms.NONE)


class Target(NamedTuple):
    """Checkpoints of a target and its drafters, and the target as it is."""

    target: Path
    model: TargetModel
    eagle3: Path
    dflash: Path

    @classmethod
    def made(cls, root: Path) -> "Target":
        path = tiny_target(root / "target", peaked=True)
        model = TargetModel(path, device=torch.device("cpu"), dtype=torch.float32)
        return cls(path, model, tiny_eagle3(root / "eagle3", path), tiny_dflash(root / "dflash", path))

    def forward(self, text: Sequence[int], captured: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T, V] and features [T, F] of a text, on the host."""
        found = self.model.forward(text, captured)
        return self.model.logits(found.final), found.features.flatten(1)

    def likeliest(self, prompt: Sequence[int], text: Sequence[int]) -> list[int]:
        """The likeliest token behind `prompt` and each of `text` but the last: `text`, if it was decoded plainly."""
        logits, _ = self.forward([*prompt, *text], ())
        found: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return found


class UnderWay(NamedTuple):
    """A round whose results are on their way to the host."""

    reqs: list[Any]
    round: Round
    results: Download
    done: Any


class TinyServer:
    """`size` requests, in rows 1 … size. Use inside `phantom` and `kernels_taken`."""

    def __init__(self, target: Target, world: Streams, size: int, seed: int) -> None:
        self.target, self.world, self.size, self.random = target, world, size, random.Random(seed)
        self.host, rows = HostView.of(CUDA, late=True), size + 1
        self.drafters, self.captured = _drafters(target, size * CONTEXT + 1)
        held = Quarantine(self.drafters, from_text=of_text(self.drafters))
        width = len(self.captured) * target.model.hidden_size
        self.sync = DraftSync(self.drafters, RING, width, torch.float32, held)
        order = list(range(1, size * CONTEXT + 1))
        self.random.shuffle(order)
        self.slots = [[0] * CONTEXT, *([order.pop() for _ in range(CONTEXT)] for _ in range(size))]
        self.table = torch.tensor(self.slots, dtype=torch.int32, device=CUDA)
        self.sync.allocate(self.table)
        self.widest = widest_of(self.drafters) + 1
        self.tokens, self.stops = TokenTable(rows, CONTEXT, self.widest, CUDA), StopTable(rows, CUDA)
        self.clock, self.controller = RoundClock(clock_of(CUDA)), Controller(AutoPolicy(), self._costs(), ())
        sources = DraftSources(self.drafters, held, target.model.vocab_size)
        self.planner = Planner(
            self.drafters, self.sync, self.controller, self.clock, held, sources, self.host
        )
        self.learner = Learner(
            self.drafters,
            self.controller,
            self.clock,
            Tally.of(self.drafters),
            held,
            verifying=self.sync.verifying,
        )
        self.epilogue = Epilogue(
            self.sync.rings, self.tokens.data, self.stops, None, self.widest, lambda: {"entropy"}
        )
        self.drafting = DraftStage(
            self.drafters,
            self.sync,
            self.clock,
            self.table,
            self.tokens.data,
            self.stops.few,
            self.host,
            sources,
            held,
            rows_for=lambda rows, _: rows,
        )
        self.quarantine, self.under_way = held, deque[UnderWay]()
        self.reqs: list[Any] = [None] * size
        self.ended: list[Any] = []
        self.seq_lens = torch.zeros(size, dtype=torch.int64, device=CUDA)
        self.bonus = torch.zeros(size, dtype=torch.int64, device=CUDA)

    def _costs(self) -> LookedUpCosts:
        costs, rows = LookedUpCosts(lambda arm: rows_of(self.drafters, arm)), tuple(range(1, 65))
        seconds = Sizes(rows, tuple(0.007 + 0.00002 * count for count in rows))
        drafts = {arm: Sizes((1, 64), (0.001, 0.002)) for arm in (arms.AR, arms.DIFFUSION)}
        costs.tables = CostTables(Verifications(0, 1, seconds, seconds), drafts, {})
        return costs

    def route_at_random(self) -> None:
        """From now on every arm drafts for somebody."""
        route = self.controller.route

        def chosen(rows: Sequence[int], forecasts: Sequence[Any]) -> list[str]:
            route(rows, forecasts)
            return [
                self.random.choice([arm for arm in ROUTES if arm == arms.NONE or arm in may])
                for may in forecasts
            ]

        self.controller.route = chosen  # type: ignore[method-assign]

    def prefill(self, index: int, prompt: Sequence[int]) -> None:
        """A request begins: a forward over its prompt, K and V of both drafters, one upload."""
        row, length, rid = index + 1, len(prompt), f"r{index}-{len(self.ended)}"
        self.quarantine.begin(rid, None)
        logits, features = self._launched(lambda: self.target.forward(prompt, self.captured))
        first = logits[-1].argmax()
        self.reqs[index] = SimpleNamespace(rid=rid, origin_input_ids=list(prompt), output_ids=[])
        for drafter in of_text(self.drafters).values():
            drafter.begin(row, RequestHints(), None, prompt=length)
        self.controller.open(row, rid, RequestHints(), ())
        upload = Upload()
        self.tokens.begin(upload, row, prompt)
        self.stops.begin(upload, row, ())
        lists = ([row], [length - 1], [length], range(length), [*prompt[1:], 0], self.slots[row][:length])
        at = [upload.ints(list(values)) for values in lists]
        ints, _ = upload.send(CUDA)
        rows, last, ends, positions, following, slots = (ints[i] for i in at)
        following.index_copy_(0, last, first[None])
        self.sync.prefill(
            FeatureRows(features, positions, slots, following), [row], [length], [length], rows, last
        )
        self.tokens.put_block(rows, ends, first[None, None])
        self.seq_lens[index : index + 1] = ends
        self.bonus[index : index + 1] = first
        copy, done = first[None].to("cpu", non_blocking=True), torch.cuda.Event()
        done.record()
        done.synchronize()
        self.reqs[index].output_ids.append(int(copy))

    def round(self) -> None:
        """Issue a round, then learn from the one before it."""
        for previous in self.clock.begin():
            self.learner.timed(previous)
        round = self._batch()
        self.planner.plan(round)
        self.sync.catch_up(round.due, round.due_flags, round.rows, round.starts)
        self.drafting.draft(round)
        self.sync.verifying.append(round.packed_rows)
        chosen = round.chosen
        packed = (round.bonus, chosen.tokens, chosen.widths, round.starts, round.rows, self.table)
        verified = self._verified(prepare_mixed_block(*packed, rows=round.packed_rows), round)
        committed = self.epilogue.commit(verified, round.stride)
        self.epilogue.park(verified, committed)
        signals = self.epilogue.signals(verified, committed, self.learner.needs(round))
        results = results_of(round, committed, signals)
        self.seq_lens, self.bonus = results["seq_lens"], results["bonus"]
        results.copy_to_host(lambda packed: packed.to("cpu", non_blocking=True))
        done = torch.cuda.Event()
        done.record()
        self.under_way.append(UnderWay(list(self.reqs), round, results, done))
        self.clock.end(round.timed())
        while len(self.under_way) > 1:
            self.learn()

    def learn(self) -> None:
        """The oldest round that is under way."""
        reqs, round, downloaded, done = self.under_way.popleft()
        done.synchronize()
        results = downloaded.read()
        runs = zip(reqs, self.reqs, results["tokens"], results["accept_lens"], strict=True)
        kept = [tokens[:count] if then is now else [] for then, now, tokens, count in runs]
        for req, tokens in zip(self.reqs, self.learner.learn(round, results, kept), strict=True):
            req.output_ids += tokens

    def end(self, index: int, *, kept: bool) -> None:
        """The request ends, or is aborted. Whoever keeps its slots gets what is parked of it; its row is free."""
        row, req = index + 1, self.reqs[index]
        if kept:
            self.sync.leave(row, len(req.origin_input_ids) + len(req.output_ids) - 1)
            self.sync.flush()
        self.sync.forget(row)
        self.controller.forget(row)
        for drafter in of_text(self.drafters).values():
            drafter.release(row)
        self.quarantine.end(req.rid)
        self.reqs[index] = None
        self.ended.append(req)

    def _batch(self) -> Round:
        known = [len(req.origin_input_ids) + len(req.output_ids) - 1 for req in self.reqs]
        row_ids = list(range(1, self.size + 1))
        late = [self.planner.under_way(row) for row in row_ids]
        least = [n + min(more, 1) for n, more in zip(known, late, strict=True)]
        most = [n + more for n, more in zip(known, late, strict=True)]
        rows = torch.arange(1, self.size + 1, device=CUDA)
        return Round(
            rows,
            row_ids,
            self.seq_lens,
            least,
            most,
            self.bonus,
            self.reqs,
            budgets=[max(CONTEXT - 1 - n, 1) for n in most],
            ahead=[[] for _ in self.reqs],
        )

    def _verified(self, block: MixedBlock, round: Round) -> Verified:
        """One launch: each request's rows behind its text, whose drafts are verified as they are packed."""

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            width = len(self.captured) * self.target.model.hidden_size
            logits = torch.zeros(len(block.input_ids), self.target.model.vocab_size)
            features = torch.zeros(len(block.input_ids), width)
            bounds, starts = _numbers(block.qo_indptr), _numbers(round.starts)
            for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
                text = [
                    *_numbers(self.tokens.data)[i + 1][: starts[i]],
                    *_numbers(block.input_ids)[begin:end],
                ]
                logits[begin:end], features[begin:end] = (
                    found[starts[i] :] for found in self.target.forward(text, self.captured)
                )
            return logits, features

        logits, features = self._launched(forward, block.input_ids, round.starts, self.tokens.data)
        return Verified(
            logits,
            features,
            None,
            block.input_ids,
            block.qo_indptr,
            round.starts,
            round.rows,
            logits.argmax(-1),
        )

    def _launched(self, body: Any, *reads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _disable_current_modes():
            made = tuple(tensor.clone() for tensor in body())  # those of an inference cannot be written
        self.world.on_stream([tensor.held for tensor in reads], made)  # type: ignore[attr-defined]
        return tuple(map(Card, made))


def _numbers(tensor: torch.Tensor) -> list[Any]:
    assert isinstance(tensor, Card)
    found: list[Any] = tensor.held.tolist()
    return found


def _drafters(target: Target, slots: int) -> tuple[dict[str, Drafter], tuple[int, ...]]:
    """Both drafters with KV, loaded to the card, and the arm that copies; and the layers that they read."""
    model = target.model
    own = [target_layers(read_draft(path), model.num_layers) for path in (target.eagle3, target.dflash)]
    captured = tuple(sorted({layer for layers in own for layer in layers}))
    options: dict[str, Any] = {
        "device": CUDA,
        "dtype": torch.float32,
        "target_embedding": model.embedding.to(CUDA),
        "target_lm_head": model.head.to(CUDA),
    }
    chain = Eagle3Drafter.load(target.eagle3, **options).requires_grad_(False)
    block = DFlashDrafter.load(target.dflash, **options).requires_grad_(False)
    with_kv = (Eagle3Arm(chain, captured, own[0], 5, 1024), DFlashArm(block, captured, own[1], 8, 1024))
    for arm in with_kv:
        arm.allocate(slots)
    return {arm.arm: arm for arm in (*with_kv, LookupArm(Lookup(), HostView.of(CUDA, late=True)))}, captured
